"""The states under control are those of the ascent with the controller's own options, in every dtype and grad mode, and nothing below changes."""

import pytest
import torch
from controlled import CACHE, llama, read_states, unchanged, value_function
from test_controller_models import GATED, PROMPT, STEP_SIZE, STEPS, Substitution, controller, logits_of
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

import recontrol as rc
from recontrol.decoding.controller import Controller
from recontrol.decoding.recording import record_hidden_states

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared():
    return llama()


@pytest.fixture
def model(shared):
    with unchanged(shared):
        yield shared


@pytest.fixture
def value():
    return value_function(32)


@pytest.mark.parametrize("first", ["recorder", "controller"])
def test_a_recorder_sees_unedited_states_whichever_was_attached_first(model, value, first):
    inputs = {"input_ids": PROMPT, "logits_to_keep": 1}
    free = read_states(model, **inputs)
    control = controller(value, backend="oracle")
    if first == "recorder":
        with record_hidden_states(model) as recorder, control.attach(model):
            # The self-check is no token.
            assert recorder.steps == []
            edited = read_states(model, **inputs)
    else:
        with control.attach(model), record_hidden_states(model) as recorder:
            edited = read_states(model, **inputs)
    assert len(recorder.steps) == 1 and torch.equal(recorder.steps[0], free)
    assert torch.equal(edited, rc.oracle.ascend(free, value, STEP_SIZE, STEPS)) and not torch.equal(edited, free)


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_below_the_head_is_touched(value, tied):
    """States of all layers and the key/value cache are those of the free model, to the bit, also where the head's weight is the input's."""
    model = llama(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        free = model(PROMPT, output_hidden_states=True, **{CACHE: caches[0]})
        with controller(value).attach(model):
            controlled = model(PROMPT, output_hidden_states=True, **{CACHE: caches[1]})
    assert all(torch.equal(a, b) for a, b in zip(free.hidden_states, controlled.hidden_states, strict=True))
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert not torch.equal(free.logits, controlled.logits)


def test_soft_capped_logits_are_the_cap_of_the_edited_ones(value):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=0.5)).eval()
    with controller(value).attach(model):
        edited = read_states(model, input_ids=PROMPT)
        logits = logits_of(model, input_ids=PROMPT)
    with torch.no_grad():
        uncapped = model.lm_head(edited.reshape(3, 4, -1))
    assert torch.equal(logits, torch.tanh(uncapped / 0.5) * 0.5) and uncapped.abs().max() > 0.5


@pytest.mark.parametrize("options", [{"radius": 0.5}, {"target": 0.3}, {"target": 0.3, "radius": 0.5}, {"head_weights": [-2.0]}], ids=str)
@pytest.mark.parametrize("backend", ["oracle", "auto"])
def test_options_reach_the_ascent_and_the_default_differs(model, value, options, backend):
    free = read_states(model, input_ids=PROMPT)
    states = {}
    for name, chosen in {"with": options, "without": {}}.items():
        with controller(value, backend=backend, **chosen).attach(model):
            states[name] = read_states(model, input_ids=PROMPT)
    options = {name: torch.tensor(given) if name == "head_weights" else given for name, given in options.items()}
    expected = rc.ascend(free, value, STEP_SIZE, STEPS, backend=backend, **options)
    assert torch.equal(states["with"], expected) and not torch.equal(states["with"], states["without"])
    if "radius" in options and "target" not in options:
        norms = (states["with"] - free).norm(dim=1)
        # The edit reaches the radius; adding it to the state and taking it off again rounds.
        torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=1e-5, atol=0)


def test_head_weights_choose_among_heads(model):
    value = value_function(32, 64, heads=2)
    free = read_states(model, input_ids=PROMPT)
    states = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.25, -3.0)):
        with controller(value, head_weights=weights, backend="oracle").attach(model):
            states.append(read_states(model, input_ids=PROMPT))
        assert torch.equal(states[-1], rc.oracle.ascend(free, value, STEP_SIZE, STEPS, head_weights=torch.tensor(weights)))
    assert not torch.equal(states[0], states[1])
    gained = value(states[0]) - value(free)
    assert (gained[:, 0] > 0).all()


def test_step_size_and_steps_reach_the_ascent(model, value):
    free = read_states(model, input_ids=PROMPT)
    found = {}
    for step_size, steps in ((0.5, 30), (0.5, 7), (0.25, 30)):
        with Controller(value, step_size, steps, backend="oracle").attach(model):
            found[step_size, steps] = read_states(model, input_ids=PROMPT)
        assert torch.equal(found[step_size, steps], rc.oracle.ascend(free, value, step_size, steps))
    with Controller(value, backend="oracle").attach(model):
        assert torch.equal(read_states(model, input_ids=PROMPT), found[0.5, 30])
    assert not torch.equal(found[0.5, 7], found[0.5, 30]) and not torch.equal(found[0.25, 30], found[0.5, 30])


def test_zero_steps_are_bit_identical(model, value):
    free = logits_of(model, input_ids=PROMPT)
    with Controller(value, STEP_SIZE, steps=0).attach(model) as handle:
        assert torch.equal(logits_of(model, input_ids=PROMPT), free) and handle.edited_rows == 0
    with Controller(value, STEP_SIZE, steps=1).attach(model) as handle:
        assert not torch.equal(logits_of(model, input_ids=PROMPT), free) and handle.edited_rows == PROMPT.numel()


@pytest.mark.parametrize(
    ("of_model", "of_value"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_model_and_value_function_may_differ_in_dtype(of_model, of_value):
    model, value = llama().to(of_model), value_function(32).to(of_value)
    free = logits_of(model, input_ids=PROMPT)
    with Substitution(model, value):
        expected = logits_of(model, input_ids=PROMPT)
    with controller(value, backend="oracle").attach(model):
        controlled = logits_of(model, input_ids=PROMPT)
    assert controlled.dtype == of_model and value.dtype == of_value
    assert torch.equal(controlled, expected) and not torch.equal(controlled, free)
    with controller(value).attach(model):
        # Two evaluation orders in float32 may round to neighbours in the dtype of the states: assert_close allows that for each dtype.
        torch.testing.assert_close(logits_of(model, input_ids=PROMPT), expected)


def gradients(model):
    model.zero_grad()
    model(PROMPT, labels=PROMPT).loss.backward()
    found = {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_gradients_are_the_models_own_again_afterwards(model, value):
    before = gradients(model)
    with controller(value).attach(model):
        controlled = gradients(model)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # No gradient flows through an edit: what is above it learns, what is below does not.
    assert [name for name, gradient in controlled.items() if gradient is not None] == ["lm_head.weight"]
    assert not torch.equal(controlled["lm_head.weight"], before["lm_head.weight"])
    assert all(parameter.grad is None for parameter in value.parameters())
    with Controller(value, steps=0).attach(model):
        unedited = gradients(model)
    assert all(torch.equal(before[name], unedited[name]) for name in before)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("backend", ["oracle", "auto", "torch"])
def test_any_grad_mode_will_do_to_attach_and_to_run(model, inside, backend):
    # A new one each time, so that what a backend precomputes is made in this mode.
    value = value_function(32)
    with controller(value, backend=backend).attach(model):
        expected = logits_of(model, input_ids=PROMPT)
    value = value_function(32)
    with inside():
        handle = controller(value, backend=backend).attach(model)
        first = model(PROMPT).logits.detach().clone()
    with handle:
        with torch.inference_mode():
            second = model(PROMPT).logits
        third, fourth = model(PROMPT).logits.detach(), gradients(model)
    assert all(torch.equal(logits, expected) for logits in (first, second, third)) and fourth["lm_head.weight"].any()
    assert handle.edited_rows == 4 * PROMPT.numel()


def test_new_weights_of_the_value_function_are_seen_while_attached(model, value):
    with controller(value).attach(model):
        before = read_states(model, input_ids=PROMPT)
        free = read_states_below(model)
        torch.optim.SGD(value.parameters(), lr=1.0).step(lambda: value(free).sum().backward())
        after = read_states(model, input_ids=PROMPT)
    assert not torch.equal(before, after) and torch.equal(after, rc.ascend(free, value, STEP_SIZE, STEPS))


def read_states_below(model):
    with torch.no_grad():
        return model.model(PROMPT).last_hidden_state.reshape(-1, 32)
