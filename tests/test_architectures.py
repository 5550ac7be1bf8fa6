"""Every causal language model of transformers: control, `rc.generate`, `rc.collect`, and what its config says.

The oracle is an autograd loop on the weights, in the place of the state that the model's own head reads. All in float64, where rounding cannot tip a
greedy choice. `make test` runs one model of each kind (`SAMPLE`), `make test-architectures` all of them.
"""

import contextlib
import logging

import pytest
import torch
from architectures import CACHES_MORE, CONTEXT, PAD, SKIPPED, UNBATCHED, UNPADDED, VOCABULARY, class_names, small_model
from test_generation import Letters

import recontrol as rc
from recontrol.decoding.controller import CACHE_NAMES
from recontrol.decoding.hooks import output_embedding
from recontrol.decoding.model_config import cache_bytes_per_token, context_length, state_width, vocabulary_size
from recontrol.generation import trial

SAMPLE = ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "FalconForCausalLM", "MambaForCausalLM", "Gemma3ForCausalLM")
SAMPLE += ("DeepseekV3ForCausalLM", "CohereForCausalLM", "BloomForCausalLM")
STEP_SIZE, STEPS, NEW = 2.0, 10, 4
TEXTS, EQUALLY_LONG = ["To be, or not", "to be", "that is"], ["To be, or not", "to suffer the", "slings, arrow"]
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def parameter(name):
    marks = [] if name in SAMPLE else [pytest.mark.architectures]
    return pytest.param(name, marks=[*marks, pytest.mark.skip(reason=SKIPPED[name])] if name in SKIPPED else marks)


pytestmark = [pytest.mark.usefixtures("one_thread", "quick_collection"), pytest.mark.filterwarnings("ignore")]


class Tokenizer(Letters):
    name_or_path = "letters"

    def get_vocab(self):
        return {str(token): token for token in range(VOCABULARY)}


TOKENIZER = Tokenizer()


@pytest.fixture(scope="module", params=map(parameter, class_names()))
def model(request):
    found = small_model(request.param).double()
    return found if runs_in_float64(found) else small_model(request.param)


def runs_in_float64(model):
    """Whether nothing in it is made in float32 by name: routers of experts, and the softmax of a row of padding."""
    mask = torch.ones_like(PROMPTS)
    mask[1, :3] = 0
    try:
        with torch.no_grad():
            return bool(model(input_ids=PROMPTS, attention_mask=mask).logits.isfinite().all())
    except RuntimeError:
        return False


@pytest.fixture(scope="module")
def value(model):
    torch.manual_seed(1)
    found = rc.ValueFunction(width(model), (64,))
    return found.double() if model.dtype == torch.float64 else found


def width(model):
    """The size of the states that the head reads, as a hook sees it."""
    with states_read(model) as seen, torch.no_grad():
        model(input_ids=PROMPTS[:1])
    return seen[0].shape[-1]


@contextlib.contextmanager
def states_read(model, instead=None):
    """The states of every call of the head, (rows, tokens, width), `instead` put in their place."""
    seen = []

    def hook(module, args):
        seen.append(args[0].detach().clone())
        return None if instead is None else (instead(args[0]), *args[1:])

    handle = output_embedding(model).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def oracle(value):
    """states -> the states after `STEPS` steps of gradient ascent, in float64."""
    w1, b1, w2, _ = (parameter.detach().double() for parameter in value.parameters())

    @torch.enable_grad()
    def ascend(states):
        edited = states.detach().double().requires_grad_()
        for _ in range(STEPS):
            (gradient,) = torch.autograd.grad((torch.relu(edited @ w1.T + b1) @ w2.T).sum(), edited)
            edited = (edited + STEP_SIZE * gradient).detach().requires_grad_()
        return edited.detach().to(states.dtype)

    return ascend


def respond(model, ids, **options):
    """The new tokens and their logits."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits)


def close(model, found, expected):
    """Some models in float64 make a softmax or a recurrence in float32: a few of its roundings. In float32 a unit of V may flip a step early."""
    tolerance = 1e-6 if model.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_one_call_under_control(model, value):
    with torch.no_grad():
        free = model(input_ids=PROMPTS).logits
        with states_read(model, oracle(value)):
            expected = model(input_ids=PROMPTS).logits
        with rc.Controller(value, STEP_SIZE, STEPS, stop_token_ids=()).attach(model) as handle:
            found = model(input_ids=PROMPTS).logits
            assert handle.edited_rows > 0
        close(model, found, expected)
        assert (found - free).abs().max() > 1e-3
        assert torch.equal(model(input_ids=PROMPTS).logits, free)


def test_greedy_generation_under_control(model, value):
    free, _ = respond(model, PROMPTS)
    with states_read(model, oracle(value)):
        expected, expected_logits = respond(model, PROMPTS)
    with rc.Controller(value, STEP_SIZE, STEPS, stop_token_ids=()).attach(model):
        found, logits = respond(model, PROMPTS)
    assert torch.equal(found, expected) and free.shape == found.shape
    close(model, logits, expected_logits)


def texts(model):
    """Prompts that make a batch."""
    if type(model).__name__ in UNBATCHED:
        pytest.skip(UNBATCHED[type(model).__name__])
    return EQUALLY_LONG if type(model).__name__ in UNPADDED else TEXTS


def alone(model, prompt, control):
    """The tokens of one prompt, under a Controller if it has a control."""
    ids = torch.tensor(TOKENIZER([prompt]).input_ids)
    with contextlib.nullcontext() if control is None else rc.Controller(control.value, control.step_size, control.steps, stop_token_ids=()).attach(model):
        return respond(model, ids)[0][0].tolist()


def responses(model, controls, **options):
    keywords = {"max_new_tokens": NEW, "eos_token_id": -1, **options}
    return rc.generate(model, TOKENIZER, texts(model), controls, **keywords)


def test_batches_give_what_each_prompt_gets_alone(model, value, caplog):
    controls = [rc.Control(value, STEP_SIZE, STEPS), None, rc.Control(value, 1.0, 4)]
    expected = [alone(model, prompt, control) for prompt, control in zip(texts(model), controls, strict=True)]
    static = responses(model, controls, batching="static")
    assert [response.token_ids for response in static] == expected
    reason = trial.why_not(model)
    with caplog.at_level(logging.INFO, logger="recontrol"):
        auto = responses(model, controls)
    assert [response.token_ids for response in auto] == expected
    (batching,) = {response.batching for response in auto}
    assert batching == "static" or reason is None
    assert batching == "continuous" or "batching is static: " in caplog.text


def test_collected_states_are_those_that_each_prompt_reads_alone(model, tmp_path):
    # Some read a padding token in a response as padding.
    options = {"max_new_tokens": NEW, "suppress_tokens": [PAD], "eos_token_id": None}
    scores = [0.0] * len(TEXTS)
    rollouts = rc.collect(model, TOKENIZER, texts(model), lambda prompts, responses: scores, tmp_path / "r", progress=False, **options)
    batch = rollouts.batch(range(len(TEXTS)))
    expected = []
    for place, prompt in enumerate(texts(model)):
        with states_read(model) as seen:
            new, _ = respond(model, torch.tensor(TOKENIZER([prompt]).input_ids), **options)
        assert rollouts.token_ids([place]).tolist() == new[0].tolist()
        expected += [states.reshape(-1, states.shape[-1])[-1] for states in seen]
    close(model, batch.states, torch.stack(expected))


def test_what_the_config_says(model):
    assert state_width(model.config) == width(model)
    with torch.no_grad():
        assert model(input_ids=PROMPTS).logits.shape[-1] == vocabulary_size(model.config)


def cached(model):
    """Bytes of keys and values of a token, counted in the cache; None where it is of another kind."""
    with torch.no_grad():
        output = model(input_ids=PROMPTS, use_cache=True)
    cache = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, "layers"):
        return None
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)) / PROMPTS.numel()


def test_bytes_of_the_cache_are_those_that_it_takes(model):
    taken = cached(model)
    if taken == 0:
        with pytest.raises(ValueError, match="use batch_size"):
            cache_bytes_per_token(model.config, model.dtype)
    elif taken is not None and type(model).__name__ not in CACHES_MORE:
        assert cache_bytes_per_token(model.config, model.dtype) == taken


def test_a_row_as_long_as_the_context_runs(model):
    """Where a longer one fails, as at the end of a table of positions, the context must be known; without a context any row runs."""
    context = context_length(model.config)
    length = 3 * CONTEXT if context is None else min(context, 3 * CONTEXT)
    with torch.no_grad():
        assert model(input_ids=torch.full((1, length), 7)).logits.isfinite().all()
