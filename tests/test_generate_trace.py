"""What control did to a response, token by token, against what a plain run of the model shows."""

import pytest
import torch
from generating import BATCHINGS, NEW, PROMPTS, TOKENIZER, alone, double_llama, generate, value
from transformers import CohereConfig, CohereForCausalLM

import recontrol as rc
from recontrol.decoding.recording import record_hidden_states

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")


def scaled():
    """A model that goes on with its logits after the output embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 98}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    return CohereForCausalLM(CohereConfig(**sizes, **tokens, max_position_embeddings=64, logit_scale=0.25, initializer_range=0.5)).double().eval()


def wanted_trace(model, prompt, control, tokens, bend):
    """From the states that the model reads when the whole response is put into it at once."""
    ids = torch.tensor([TOKENIZER([prompt]).input_ids[0] + tokens])
    seen = []
    spy = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(ids)
    spy.remove()
    states = seen[0][-len(tokens) - 1 : -1]
    keywords = {"radius": control.radius, "target": control.target, "head_weights": control.head_weights}
    edited = rc.oracle.ascend(states, control.value, control.step_size, control.steps, **keywords)
    weights = torch.tensor(control.head_weights or [1.0], dtype=torch.float64)
    head = model.get_output_embeddings()
    with torch.no_grad():
        log_p, log_q = (bend(head(each)).log_softmax(-1) for each in (edited, states))
        values = [control.value(each) @ weights for each in (states, edited)]
    return [*values, (edited - states).norm(dim=-1), (log_p.exp() * (log_p - log_q)).sum(-1)]


MODELS = {
    "llama": (double_llama, lambda logits: logits),
    "scaled logits": (scaled, lambda logits: 0.25 * logits),
}
CONTROLS = {
    "plain": lambda: rc.Control(value(64), 3.0, 9),
    "radius": lambda: rc.Control(value(64, 32), 3.0, 9, radius=1.0),
    "target": lambda: rc.Control(value(64), 0.3, 9, target=1.0),
    "heads": lambda: rc.Control(value(64, heads=2), 3.0, 9, head_weights=[1.0, -1.0]),
    "no steps": lambda: rc.Control(value(64), 3.0, 0),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("make, bend", MODELS.values(), ids=MODELS)
def test_the_trace_is_that_of_the_states_that_were_read(batching, make, bend):
    model = make()
    controls = [make_control() for make_control in CONTROLS.values()]
    responses = generate(model, PROMPTS[: len(controls)], controls, batching=batching, trace=True, block_tokens=4)
    for prompt, control, response in zip(PROMPTS, controls, responses, strict=False):
        trace = response.trace
        found = [trace.value_before, trace.value_after, trace.edit_norm, trace.divergence]
        assert [len(each) for each in found] == [len(response.token_ids)] * 4
        for numbers, wanted in zip(found, wanted_trace(model, prompt, control, response.token_ids, bend), strict=True):
            torch.testing.assert_close(torch.tensor(numbers, dtype=torch.float64), wanted, rtol=1e-4, atol=1e-5)


def test_climbing_raises_v_and_bends_the_distribution():
    trace = generate(double_llama(), PROMPTS[:1], rc.Control(value(64), 3.0, 9), trace=True)[0].trace
    assert all(after > before for before, after in zip(trace.value_before, trace.value_after, strict=True))
    assert min(trace.edit_norm) > 0.1 and min(trace.divergence) > 0.01


def test_there_is_none_unless_asked_for_or_without_control():
    model = double_llama()
    control = rc.Control(value(64), 3.0, 9)
    assert [response.trace for response in generate(model, PROMPTS[:2], control)] == [None, None]
    traced = generate(model, PROMPTS[:2], [None, control], trace=True)
    assert traced[0].trace is None and len(traced[1].trace.divergence) == len(traced[1].token_ids)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_what_is_cut_off_leaves_the_trace_too(batching):
    model = double_llama()
    control = rc.Control(value(64), 3.0, 9)
    whole = generate(model, PROMPTS[:2], control, eos_token_id=2, trace=True)
    kept = NEW // 2
    stop = whole[0].text[kept : kept + 3]
    cut = generate(model, PROMPTS[:2], control, eos_token_id=2, trace=True, stop_strings=[stop], batching=batching)[0]
    assert len(cut.token_ids) == kept
    assert cut.trace.edit_norm == pytest.approx(whole[0].trace.edit_norm[:kept]) and len(cut.trace.divergence) == kept


def test_recorders_see_the_states_before_the_edit():
    model = double_llama()
    control = rc.Control(value(64), 3.0, 9)
    with record_hidden_states(model) as recorder:
        responses = generate(model, PROMPTS[:1], control, batching="static", trace=True)
    states = torch.stack([state[0] for state in recorder.steps])
    with torch.no_grad():
        before = control.value(states)[:, 0].tolist()
    assert responses[0].trace.value_before == pytest.approx(before, rel=1e-5)
    assert responses[0].token_ids == alone(model, PROMPTS[0], control)
