"""On a GPU: the ascent is captured in a CUDA graph and replayed with other arguments, and so is the whole decode step, control included."""

import sys
from pathlib import Path

import pytest
import torch
from controlled import llama, value_function
from test_controller_models import EOS

# Last, so that an installed recontrol comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import recontrol as rc
from benchmarks.gpu.llama import DecodeStep
from recontrol.ascent.backends import BACKENDS, capturable
from recontrol.decoding.static_decoder import StaticDecoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds none")]
NEW, LONGEST = 12, 32
STEP_SIZE, STEPS = 2.0, 20
# Of the edit, by whichever order the sums are added up in; a unit may flip a step early.
EDIT_ERROR = 1e-2


@pytest.fixture(params=capturable())
def backend(request):
    status = BACKENDS[request.param].status() if request.param in BACKENDS else {"available": False, "reason": "it is not in this build"}
    if not status["available"]:
        pytest.skip(f"backend {request.param!r}: {status['reason']}")
    return request.param


@pytest.fixture
def replays(monkeypatch):
    """Every replay of a CUDA graph, whoever asks for it."""
    seen = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (seen.append(1), replay(graph))[1])
    yield seen
    torch.compiler.reset()


def models_and_prompts(rows):
    # In float32, so that the tokens do not hang on how sums are rounded.
    model = llama(initializer_range=0.5).to("cuda")
    ids = torch.arange(5, 5 + 4 * rows, device="cuda").reshape(rows, 4)
    return model, value_function(32).to("cuda"), ids


def test_a_captured_ascent_follows_new_states_step_sizes_steps_and_masks(backend):
    value = value_function(64, 96).to("cuda")
    hidden, mask = torch.randn(5, 64, device="cuda"), torch.ones(5, dtype=torch.bool, device="cuda")
    step_size, steps = torch.full((5,), 0.5, device="cuda"), torch.full((5,), 3, device="cuda")

    def ascend():
        return rc.ascend(hidden, value, step_size, steps, mask=mask, backend=backend)

    ascend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        edited = ascend()
    for seed in range(3):
        torch.manual_seed(seed)
        hidden.copy_(torch.randn(5, 64))
        step_size.copy_(torch.rand(5))
        steps.copy_(torch.randint(0, 40, (5,)))
        mask.copy_(torch.rand(5) > 0.3)
        edited.fill_(torch.nan)
        graph.replay()
        live = mask & (steps > 0)
        assert torch.equal(edited[~live], hidden[~live])
        # The same kernels on the same numbers.
        assert torch.equal(edited, ascend())
        wanted = rc.oracle.ascend(hidden.double(), value_function(64, 96).to("cuda").double(), step_size, steps, mask=mask)
        assert (edited.double() - wanted).norm() <= EDIT_ERROR * (wanted - hidden).norm()


@pytest.mark.parametrize("rows", [1, 4])
def test_a_decode_step_under_control_is_one_replay_of_one_graph(backend, replays, rows):
    model, value, ids = models_and_prompts(rows)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0, EOS]}
    decoder = StaticDecoder(model, rows, LONGEST)
    free = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with rc.Controller(value, STEP_SIZE, STEPS, backend=backend).attach(model) as handle:
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        # The first run compiles and warms up, the second may still record.
        first = [decoder.generate(ids, **options) for _ in range(2)]
        edited = handle.edited_rows
        replays.clear()
        controlled = decoder.generate(ids, **options)
        # The prefill samples the first token without a graph.
        assert len(replays) == NEW - 1
        # A graph without the edit would count nothing and decode as the free model does.
        assert handle.edited_rows - edited == rows * NEW
    assert all(torch.equal(tokens, expected) for tokens in (*first, controlled))
    assert not torch.equal(controlled, free)
    if rows == 1:
        # No graph from before goes on with the edit.
        assert torch.equal(decoder.generate(ids, **options), free)


def test_every_captured_step_computes_what_it_computes_without_a_graph(backend):
    """Without the compiler, which rounds differently, so that logits can be compared: each step, edits and finished rows included."""
    model, value, ids = models_and_prompts(2)
    free = DecodeStep(model, ids, LONGEST)
    free()
    # Every second token ends a response, so nearly every step has a row that is not edited.
    with rc.Controller(value, STEP_SIZE, STEPS, backend=backend, stop_token_ids=range(0, model.config.vocab_size, 2)).attach(model) as handle:
        plain, captured = DecodeStep(model, ids, LONGEST, captured=False), DecodeStep(model, ids, LONGEST)
        for tokens in range(1, NEW):
            start = handle.edited_rows
            plain(tokens)
            edited = handle.edited_rows - start
            captured(tokens)
            assert handle.edited_rows - start == 2 * edited
            assert torch.equal(plain.ids, captured.ids)
            # The same kernels on the same numbers; which kernel multiplies matrices may depend on the workspace that is free.
            torch.testing.assert_close(captured.logits, plain.logits, rtol=1e-3, atol=1e-3)
        assert edited < 2 * (NEW - 1)
        captured()
    assert not torch.equal(captured.logits, free.logits)


def test_a_backend_that_waits_for_the_device_is_refused_before_it_breaks_a_recording():
    model, value, ids = models_and_prompts(1)
    decoder = StaticDecoder(model, 1, LONGEST)
    with rc.Controller(value, backend="torch").attach(model), pytest.raises(RuntimeError, match="so no CUDA graph can hold it"):
        decoder.generate(ids, max_new_tokens=NEW)
