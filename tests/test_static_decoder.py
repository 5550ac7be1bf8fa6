"""Decoding with a static cache and a compiled step: the same tokens, one graph, nothing compiled twice, nothing waited for.

No CUDA graph is recorded here (tests/test_gpu_decode.py does that); what the compiler asks of a graph that is to be recorded is looked at instead.
"""

import contextlib

import pytest
import torch
from controlled import CACHE, Operations, llama, value_function
from test_controller_models import EOS, controller, logits_of
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from transformers import CompileConfig, LlamaForCausalLM, StaticCache

from recontrol.decoding.controller import Controller
from recontrol.decoding.static_decoder import StaticDecoder

NEW, LONGEST = 8, 16
PROMPTS = torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23], [40, 41, 42, 43], [0, 0, 60, 61]])
MASK = (PROMPTS > 0).long()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=1, initializer_range=0.5)


@pytest.fixture
def graphs():
    """What was compiled since: for each graph the inputs that keep their address, and the inputs that are written."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def step_compiled_into(graphs):
    """The default settings but for the code that is made, which would take long."""

    def backend(module, inputs):
        def keep(traced, _):
            known = TracingContext.try_get().fw_metadata
            written = [index for index, entry in enumerate(known.input_info) if entry.mutates_data]
            graphs.append((known.static_input_indices, written, len(known.input_info), traced))
            return traced

        return aot_module_simplified(module, inputs, fw_compiler=keep)

    return CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)


def generate(decode, rows, **options):
    torch.manual_seed(3)
    return decode(PROMPTS[rows], attention_mask=MASK[rows], max_new_tokens=NEW, **{"do_sample": False, "suppress_tokens": [0, EOS], **options})


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("rows", [slice(1), slice(4)], ids=["1 row", "4 rows, padded"])
def test_tokens_are_those_of_generate_and_the_step_is_one_graph_compiled_once(model, graphs, rows, controlled):
    batch = len(PROMPTS[rows])
    free = generate(model.generate, rows)
    decoder = StaticDecoder(model, batch, LONGEST, step_compiled_into(graphs))
    with controller(value_function(32), backend="oracle").attach(model) if controlled else contextlib.nullcontext() as handle:
        expected = generate(model.generate, rows)
        edited = handle.edited_rows if controlled else 0
        for _ in range(3):
            assert torch.equal(generate(decoder.generate, rows), expected)
        # Sampling draws from the same logits, and a shorter prompt goes through the same step.
        options = {"do_sample": True, "top_k": 5}
        assert torch.equal(generate(decoder.generate, rows, **options), generate(model.generate, rows, **options))
        assert not controlled or (edited == batch * NEW and handle.edited_rows == 6 * edited)
    assert torch.equal(expected, free) != controlled
    ((fixed, written, inputs, traced),) = graphs
    # What is written (the cache, its lengths, the count of edits) keeps its address, or no CUDA graph is recorded.
    assert set(written) <= set(fixed)
    # All but the tokens, their positions and the mask keep theirs, so that a replay copies nothing else.
    assert inputs - len(fixed) <= 3
    assert sum("ascend" in str(node.target) for node in traced.graph.nodes) == controlled


@pytest.mark.parametrize("compiled", [True, False])
def test_finished_rows_are_left_alone(model, graphs, compiled):
    value, rows = value_function(32, heads=2), slice(3)
    options = {"head_weights": (0.5, 1.0), "backend": "oracle"}
    with controller(value, **options).attach(model):
        tokens = generate(model.generate, rows)[:, 4:].tolist()
    ends = [tokens[0][1], tokens[1][4]]
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), NEW) for row in tokens]
    assert lengths == [2, 5, NEW], "the seed no longer gives rows that end at different times"
    decoder = StaticDecoder(model, 3, LONGEST, step_compiled_into(graphs) if compiled else None)
    with controller(value, stop_token_ids=(*ends, 0), **options).attach(model) as handle:
        expected = generate(model.generate, rows, eos_token_id=ends, suppress_tokens=[0])
        assert handle.edited_rows == sum(lengths)
        found = generate(decoder.generate, rows, eos_token_id=ends, suppress_tokens=[0])
    assert torch.equal(found, expected) and handle.edited_rows == 2 * sum(lengths)
    assert len(graphs) == compiled


def test_a_prompt_of_one_token_after_another_prompt_is_a_prefill(model):
    """The cache that was emptied keeps its length on the device; a token that ends responses may be the whole prompt."""
    ids = torch.tensor([[EOS], [0]])
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0, EOS]}
    decoder = StaticDecoder(model, 2, LONGEST)
    with controller(value_function(32), backend="oracle").attach(model) as handle:
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        generate(decoder.generate, slice(2))
        assert torch.equal(decoder.generate(ids, **options), expected)
    assert handle.edited_rows == 3 * 2 * NEW


def test_a_decoder_serves_calls_in_and_out_of_inference_mode(model):
    decoder = StaticDecoder(model, 1, LONGEST)
    with torch.inference_mode():
        first = generate(decoder.generate, slice(1))
    assert torch.equal(generate(decoder.generate, slice(1)), first)


def test_control_of_a_decode_step_neither_waits_for_the_device_nor_copies_from_the_host(model):
    value = value_function(32, heads=2)

    def step(past):
        with Operations() as operations:
            logits_of(model, input_ids=PROMPTS[:, :1], use_cache=True, **{CACHE: past})
        return operations.names

    def filled():
        past = StaticCache(config=model.config, max_cache_len=LONGEST)
        logits_of(model, input_ids=PROMPTS, use_cache=True, **{CACHE: past})
        return past

    free = step(filled())
    with controller(value, head_weights=(0.5, 1.0), radius=1.0, target=2.0).attach(model):
        controlled = step(filled())
    for name in Operations.UNCAPTURABLE:
        assert controlled.count(name) == free.count(name), name
    assert controlled.count("recontrol::ascend") == 1 and "recontrol::ascend" not in free
    # The names are those that such operations have.
    with Operations() as operations:
        bool(torch.tensor(1.0) > 0)
    assert {"aten::lift_fresh", "aten::_local_scalar_dense"} & set(operations.names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, found 0"),
        ({"batch_size": True}, "batch_size must be a positive integer, found True"),
        ({"max_tokens": 1.5}, r"max_tokens must be a positive integer, found 1\.5"),
        ({"max_tokens": 10**6}, "max_tokens is 1000000, the context of this model 2048"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        StaticDecoder(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 13}, "4 tokens of the prompts and 13 new ones make 17, this decoder is for 16: give a larger max_tokens"),
        ({"num_return_sequences": 2, "do_sample": True}, "this decoder is for 2 rows, found 4"),
        ({"num_beams": 2}, "beams move rows of the cache about"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not taken here: the decoder has a cache of its own"),
        ({"use_cache": True}, "use_cache=True is not taken here"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is not taken here: the step is for one token a row"),
        ({"max_length": 10}, "max_length=10 is not taken here: use max_new_tokens"),
    ],
    ids=str,
)
def test_calls_that_do_not_fit_are_refused(model, options, message):
    decoder = StaticDecoder(model, 2, LONGEST)
    with pytest.raises(ValueError, match=message):
        decoder.generate(PROMPTS[:2], **{"max_new_tokens": NEW, **options})
    assert decoder.generate(PROMPTS[:2], max_new_tokens=NEW).shape[0] == 2


def test_models_without_a_key_value_cache_are_refused():
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None):
            raise NotImplementedError

    with pytest.raises(TypeError, match="Forgetful keeps no key/value cache that a static one can replace"):
        StaticDecoder(llama(kind=Forgetful))
    with pytest.raises(TypeError, match="a causal language model of transformers is wanted"):
        StaticDecoder(torch.nn.Linear(2, 2))


def test_a_backend_that_a_graph_cannot_hold_is_refused_by_name(model, monkeypatch):
    """On a GPU; here the model only says that it is on one."""
    decoder = StaticDecoder(model, 1, LONGEST)
    assert decoder.compile_config is None
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    on_gpu = StaticDecoder(model, 1, LONGEST)
    assert (on_gpu.compile_config.mode, on_gpu.compile_config.fullgraph, on_gpu.compile_config.dynamic) == ("reduce-overhead", True, False)
    monkeypatch.undo()
    with Controller(value_function(32), backend="torch").attach(model):
        monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
        with pytest.raises(RuntimeError, match=r"'torch' of the controller waits for the device at every step.*choose one of 'cuda', 'triton'"):
            on_gpu.generate(PROMPTS[:1], max_new_tokens=NEW)
