"""Control of whole generations: every way to decode, rows that finish at different times, compiled models, pipelines and threads.

The oracle is a plain hook that puts `oracle.ascend(h)` in the place of h. With backend="oracle" the two must agree to the bit.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from controlled import CACHE, Failing, hooks_on, llama, states_read, unchanged, value_function
from test_controller_models import EOS, PROMPT, STEP_SIZE, STEPS, VOCABULARY, Substitution, controller, logits_of
from transformers import DynamicCache, StaticCache

import recontrol as rc
from recontrol.decoding.controller import Controller
from recontrol.decoding.recording import record_hidden_states

EXAMPLE_MODEL = Path(__file__).parent.parent / "examples" / "movie_reviews" / "lm"
NEW = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared():
    # Large weights, so that greedy responses do not repeat one token.
    return llama(initializer_range=0.5)


@pytest.fixture
def model(shared):
    with unchanged(shared):
        yield shared


@pytest.fixture
def value():
    return value_function(32)


def generate(model, ids=PROMPT, **options):
    """Nothing is decoded that ends a response, unless the test says otherwise."""
    torch.manual_seed(3)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0, EOS], **options}
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)


def same(one, other):
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


# Options of generate, and how many rows a batch of three prompts and eight new tokens has.
DECODING = {
    "greedy": ({}, 3 * NEW),
    "sampling": ({"do_sample": True}, 3 * NEW),
    "several sequences": ({"do_sample": True, "num_return_sequences": 2}, 6 * NEW),
    "beam search": ({"num_beams": 3}, 9 * NEW),
    "beam sampling": ({"num_beams": 3, "do_sample": True}, 9 * NEW),
    "without a cache": ({"use_cache": False}, 3 * NEW),
    "static cache": ({"cache_implementation": "static"}, 3 * NEW),
    # The logits at the end of the first piece of the prompt are computed, though nobody reads them.
    "prompts in pieces": ({"prefill_chunk_size": 2}, 3 * (NEW + 1)),
    "classifier-free guidance": ({"guidance_scale": 1.5}, 6 * NEW),
}


@pytest.mark.parametrize("name", DECODING)
def test_every_way_to_decode_samples_from_the_edited_states_of_computed_logits_only(model, value, name):
    options, rows = DECODING[name]
    free = generate(model, **options)
    with Substitution(model, value) as substitution:
        expected = generate(model, **options)
    with controller(value, backend="oracle").attach(model) as handle:
        controlled = generate(model, **options)
    assert same(controlled, expected) and same(generate(model, **options), free)
    assert not torch.equal(controlled.sequences, free.sequences)
    assert handle.edited_rows == rows == sum(len(states) for states in substitution.states)
    # Greedy decoding of the same row over and over would tell little.
    assert len(set(controlled.sequences[:, 4:].flatten().tolist())) > NEW


def test_guessed_tokens_are_verified_with_edited_states(model, value):
    """Several tokens of a row go in at once, each of which may be the next that is sampled."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with controller(value, backend="oracle").attach(model) as handle:
        plain = generate(model, ids)
        rows = handle.edited_rows
        guessed = generate(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, guessed.sequences) and rows == NEW
    assert handle.edited_rows - rows > NEW
    assert not torch.equal(plain.sequences, generate(model, ids).sequences)


def test_embeddings_in_the_place_of_tokens(model, value):
    options = {"inputs_embeds": model.get_input_embeddings()(PROMPT).detach(), "attention_mask": torch.ones_like(PROMPT), "max_new_tokens": NEW}
    with controller(value, backend="oracle").attach(model) as handle:
        expected = generate(model).sequences[:, 4:]
        found = model.generate(**options, do_sample=False, suppress_tokens=[0, EOS])
    assert torch.equal(found, expected) and handle.edited_rows == 2 * 3 * NEW


@pytest.mark.parametrize("cache", [None, "static"])
def test_padded_rows_get_what_they_get_alone(model, value, cache):
    prompts = [[5], [6, 7, 8], [9, 10, 11, 12, 13]]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"cache_implementation": cache} if cache else {}
    with Substitution(model, value):
        expected = generate(model, ids, attention_mask=mask, **options)
    with controller(value, backend="oracle").attach(model) as handle:
        together = generate(model, ids, attention_mask=mask, **options)
        rows = handle.edited_rows
        alone = [generate(model, torch.tensor([prompt]), **options) for prompt in prompts]
    assert same(together, expected) and rows == 3 * NEW
    for row, single in enumerate(alone):
        assert torch.equal(single.sequences[0, -NEW:], together.sequences[row, -NEW:])
        for a, b in zip(single.logits, together.logits, strict=True):
            # Attention over a padded row sums in another order, and the ascent carries that rounding on.
            torch.testing.assert_close(a[0], b[row], rtol=1e-4, atol=1e-4)


def test_the_rest_of_a_prompt_is_a_prefill_like_any_other(model, value):
    """Control leaves the cache alone, so that of a free run serves; and a rest of two tokens may begin with one that ends responses."""
    ids = torch.cat([PROMPT[:, :2], torch.full((3, 1), EOS), PROMPT[:, 3:]], dim=1)
    cache = DynamicCache(config=model.config)
    logits_of(model, input_ids=ids[:, :2], use_cache=True, **{CACHE: cache})
    with controller(value, backend="oracle").attach(model) as handle:
        whole = generate(model, ids)
        rows = handle.edited_rows
        rest = generate(model, ids, **{CACHE: cache})
    assert torch.equal(whole.sequences, rest.sequences) and handle.edited_rows == 2 * rows == 2 * 3 * NEW


@pytest.fixture(scope="module")
def finishing(shared):
    """End-of-sequence tokens with which the rows of a controlled sample end after different numbers of tokens, and these numbers."""
    value = value_function(32)
    with controller(value, backend="oracle").attach(shared):
        new = generate(shared, do_sample=True, max_new_tokens=12).sequences[:, 4:].tolist()
    ends = [new[0][2], new[1][6]]
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in new]
    assert lengths == [3, 7, 12], "the seed no longer gives rows that end at different times"
    return {"eos_token_id": ends, "do_sample": True, "max_new_tokens": 12, "suppress_tokens": [0]}, lengths


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "by default"])
def test_a_row_is_edited_up_to_its_end_and_no_further(shared, value, finishing, cache, named):
    options, lengths = finishing
    # By default `generate` is asked.
    stops = (*options["eos_token_id"], 0) if named else None
    with controller(value, backend="oracle", stop_token_ids=stops).attach(shared) as handle, record_hidden_states(shared) as recorder:
        assert handle.stop_token_ids == stops
        with states_read(shared) as states:
            controlled = generate(shared, **{**options, **cache})
    assert hooks_on(shared) == []
    with Substitution(shared, value):
        expected = generate(shared, **{**options, **cache})
    # What a finished row computes is thrown away, so nothing that is kept depends on the mask.
    assert torch.equal(controlled.sequences, expected.sequences)
    assert handle.edited_rows == sum(lengths) and len(states) == 12
    for step, (edited, free) in enumerate(zip(states, recorder.steps, strict=True)):
        ascended = rc.oracle.ascend(free, value, STEP_SIZE, STEPS)
        for row, length in enumerate(lengths):
            # Up to the state that sampled the end-of-sequence token.
            assert torch.equal(edited[row], (ascended if step < length else free)[row])
            assert not torch.equal(ascended[row], free[row])


def test_without_stop_tokens_rows_are_never_finished(model, value, finishing):
    options, lengths = finishing
    with controller(value, backend="oracle", stop_token_ids=()).attach(model) as handle:
        controlled = generate(model, **options)
    with Substitution(model, value):
        expected = generate(model, **options)
    assert handle.stop_token_ids == () and handle.edited_rows == 3 * 12 > sum(lengths)
    assert same(controlled, expected)


def test_without_a_cache_finished_rows_are_known_to_generate_but_cannot_be_told_by_tokens(model, value, finishing):
    options, lengths = finishing
    for stops, rows in ((None, sum(lengths)), ((*options["eos_token_id"], 0), 3 * 12)):
        with controller(value, stop_token_ids=stops).attach(model) as handle:
            generate(model, use_cache=False, **options)
        assert handle.edited_rows == rows


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=["dynamic", "static", "none"])
def test_a_prompt_of_one_end_of_sequence_token_is_no_finished_row(model, value, cache):
    ids = torch.tensor([[EOS], [0], [5]])
    with Substitution(model, value):
        expected = generate(model, ids, **cache)
    with controller(value, backend="oracle", stop_token_ids=(EOS, 0)).attach(model) as handle:
        controlled = generate(model, ids, **cache)
    assert same(controlled, expected) and handle.edited_rows == 3 * NEW


def test_a_static_cache_that_was_emptied_is_empty(model, value):
    """It keeps its length on the device once it is allocated, which tells a prompt of one token from a decode step."""
    ids = torch.tensor([[EOS], [0], [5]])
    cache = StaticCache(config=model.config, max_cache_len=4)
    with controller(value, backend="oracle", stop_token_ids=(EOS, 0)).attach(model) as handle:
        counts = []
        for _ in range(2):
            cache.reset()
            for _ in range(2):
                logits_of(model, input_ids=ids, use_cache=True, **{CACHE: cache})
                counts.append(handle.edited_rows)
    assert counts == [3, 3 + 1, 3 + 1 + 3, 3 + 1 + 3 + 1]


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_known_of_finished_rows_ends_with_the_forward_call(model, value, failing):
    """Whoever calls the head by hand afterwards has all rows edited, also when the call broke off."""
    states, cache = torch.randn(3, 32), DynamicCache(config=model.config)
    with controller(value, backend="oracle", stop_token_ids=(EOS, 0)).attach(model) as handle, torch.no_grad():
        logits_of(model, input_ids=PROMPT, use_cache=True, **{CACHE: cache})
        hook = Failing(model.model.layers[1], ZeroDivisionError(), 1) if failing else None
        with pytest.raises(ZeroDivisionError) if failing else contextlib.nullcontext():
            logits_of(model, input_ids=torch.full((3, 1), EOS), use_cache=True, **{CACHE: cache})
        assert handle.edited_rows == PROMPT.numel() and not (hook and hook.left)
        logits = model.lm_head(states)
        assert handle.edited_rows == PROMPT.numel() + 3
    with torch.no_grad():
        assert torch.equal(logits, model.lm_head(rc.oracle.ascend(states, value, STEP_SIZE, STEPS)))


def compiled(model, style, backend="eager"):
    """Compiled whole, as `torch.compile(model)` or in the place of its forward; "eager" runs what was traced as it is, without making code."""
    if style == "model":
        return torch.compile(model, fullgraph=True, backend=backend)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    return model


@pytest.fixture
def small():
    """One layer compiles faster; and what is compiled, test by test, must not be left to the next."""
    torch.compiler.reset()
    yield llama(num_hidden_layers=1, initializer_range=0.5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("style", "first", "backend"),
    [
        ("model", "compiled and run", "eager"),
        ("model", "attached", "aot_eager"),
        ("forward", "compiled and run", "eager"),
        ("forward", "attached", "eager"),
    ],
)
def test_compiled_models_are_controlled_and_free_again(small, value, style, first, backend):
    free = logits_of(small, input_ids=PROMPT)
    with Substitution(small, value):
        expected = logits_of(small, input_ids=PROMPT)
    control = controller(value, backend="oracle")
    if first == "attached":
        handle = control.attach(small)
        model = compiled(small, style, backend)
    else:
        model = compiled(small, style, backend)
        assert torch.equal(logits_of(model, input_ids=PROMPT), free)
        handle = control.attach(model)
    with handle:
        for _ in range(2):
            assert torch.equal(logits_of(model, input_ids=PROMPT), expected)
        with handle.pause():
            assert torch.equal(logits_of(model, input_ids=PROMPT), free)
        assert torch.equal(logits_of(model, input_ids=PROMPT), expected)
        assert handle.edited_rows == 3 * PROMPT.numel()
    assert torch.equal(logits_of(model, input_ids=PROMPT), free) and handle.edited_rows == 3 * PROMPT.numel()
    # Another controller is not taken for the first.
    with Controller(value, 0.25, 2, backend="oracle", self_check=False).attach(model):
        other = logits_of(model, input_ids=PROMPT)
    assert not torch.equal(other, expected) and not torch.equal(other, free) and not torch.equal(expected, free)
    assert hooks_on(small) == []


@pytest.mark.parametrize(("style", "cache"), [("model", DynamicCache), ("model", StaticCache), ("forward", DynamicCache)])
def test_compiled_decode_steps_leave_finished_rows_alone(small, value, style, cache):
    steps = torch.tensor([[EOS], [20], [0]]), torch.tensor([[20], [EOS], [21]]), torch.tensor([[22], [23], [24]])

    def run(model):
        past = StaticCache(config=small.config, max_cache_len=8) if cache is StaticCache else DynamicCache(config=small.config)
        return [logits_of(model, input_ids=ids, use_cache=True, **{CACHE: past})[:, -1] for ids in (PROMPT, *steps)]

    free, stops = run(small), (EOS, 0)
    with controller(value, backend="oracle", stop_token_ids=stops).attach(small) as handle:
        expected = run(small)
    rows = handle.edited_rows
    model = compiled(small, style)
    with controller(value, backend="oracle", self_check=False, stop_token_ids=stops).attach(model) as handle:
        found = run(model)
    assert handle.edited_rows == rows == PROMPT.numel() + 1 + 2 + 3
    for controlled, wanted, uncontrolled, live in zip(found, expected, free, ([0, 1, 2], [1], [0, 2], [0, 1, 2]), strict=True):
        # Under the compiler, attention over a static cache takes another kernel, which rounds differently.
        torch.testing.assert_close(controlled, wanted, rtol=1e-5, atol=1e-5)
        apart = (controlled - uncontrolled).abs().amax(1) > 1e-3
        assert apart.nonzero().flatten().tolist() == live
    for controlled, wanted in zip(run(model), free, strict=True):
        torch.testing.assert_close(controlled, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("style", "cache"), [("model", {}), ("forward", {}), ("forward", {"cache_implementation": "static"})], ids=str)
def test_compiled_models_generate_under_control(small, value, style, cache):
    free = generate(small, **cache)
    with controller(value, backend="oracle").attach(small):
        expected = generate(small, **cache)
    model = compiled(small, style)
    # The hooks find the head, whether they are given the model or what the compiler made of it.
    with controller(value, backend="oracle").attach(small) as handle, record_hidden_states(model) as recorder:
        controlled = generate(model, **cache)
    assert torch.equal(controlled.sequences, expected.sequences) and handle.edited_rows == 3 * NEW
    assert torch.equal(generate(model, **cache).sequences, free.sequences) and not torch.equal(expected.sequences, free.sequences)
    assert len(recorder.steps) == NEW
    for recorded, logits in zip(recorder.steps, controlled.logits, strict=True):
        with torch.no_grad():
            wanted = small.lm_head(rc.oracle.ascend(recorded, value, STEP_SIZE, STEPS))
        # The same operations on the same numbers, but not all in the same memory layout.
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_pipeline_is_controlled_through_its_model():
    """The example's model: bfloat16, tied embeddings, a tokenizer that pads on the left; the value function is float32."""
    pipeline = transformers.pipeline("text-generation", model=str(EXAMPLE_MODEL), device="cpu")
    texts = ["The movie", "A long and boring film that", "I"]
    value = value_function(256, 32)
    options = {"batch_size": 3, "max_new_tokens": 6, "do_sample": False, "return_full_text": False}

    def respond():
        return [responses[0]["generated_text"] for responses in pipeline(texts, **options)]

    def substitute(module, args):
        return (rc.oracle.ascend(args[0].reshape(-1, 256), value, 20.0, 20).reshape(args[0].shape),)

    free = respond()
    hook = pipeline.model.lm_head.register_forward_pre_hook(substitute)
    expected = respond()
    hook.remove()
    with Controller(value, 20.0, 20, backend="oracle").attach(pipeline.model) as handle:
        assert respond() == expected != free
    assert 3 * 6 >= handle.edited_rows > 3
    assert respond() == free
    with pytest.raises(TypeError, match=r"one with get_output_embeddings\(\); found TextGenerationPipeline"):
        Controller(value).attach(pipeline)


def in_threads(*functions):
    """The results of functions that all start at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(functions))
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(lambda run=run: (barrier.wait(), run())[1]) for run in functions]]


def test_two_models_under_control_in_two_threads_do_as_they_do_alone(value):
    models = [llama(seed, initializer_range=0.5) for seed in range(2)]
    controllers = [controller(value, backend="oracle"), Controller(value_function(32, 16), 0.5, 5, backend="torch")]

    def run(index):
        with controllers[index].attach(models[index]) as handle:
            return generate(models[index], max_new_tokens=24), handle.edited_rows

    alone = [run(0)[0], run(1)[0]]
    for _ in range(3):
        for (found, rows), expected in zip(in_threads(lambda: run(0), lambda: run(1)), alone, strict=True):
            assert same(found, expected) and rows == 3 * 24
    assert not torch.equal(alone[0].sequences, generate(models[0], max_new_tokens=24).sequences)


def test_one_model_under_control_in_two_threads_does_as_it_does_alone(model, value):
    """Each thread has a mask of its own: half of the tokens end a response, so nearly every step has one."""
    prompts = PROMPT, PROMPT + 40

    def run(ids):
        return generate(model, ids, max_new_tokens=40, eos_token_id=None)

    with controller(value, backend="oracle", stop_token_ids=range(0, VOCABULARY, 2)).attach(model):
        alone = [run(ids) for ids in prompts]
        for _ in range(3):
            together = in_threads(*(lambda ids=ids: run(ids) for ids in prompts))
            assert all(same(found, expected) for found, expected in zip(together, alone, strict=True))
    with controller(value, backend="oracle", stop_token_ids=()).attach(model):
        assert not same(run(PROMPT), alone[0])
