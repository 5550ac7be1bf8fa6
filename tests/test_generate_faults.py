"""Bad input is refused before any work is done, and whatever goes wrong leaves the model as it was."""

import _thread
import contextlib
import logging

import pytest
import torch
from controlled import Failing, hooks_on
from generating import BATCHINGS, PROMPTS, TOKENIZER, alone, continuous_only, decoding_threads, double_llama, generate, value
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

import recontrol as rc
from recontrol.decoding.fingerprint import model_fingerprint
from recontrol.generation import continuous

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")


@pytest.fixture(scope="module")
def shared():
    return double_llama()


@pytest.fixture
def model(shared):
    implementation = shared.config._attn_implementation
    yield shared
    assert hooks_on(shared) == [] and decoding_threads() == [] and shared.config._attn_implementation == implementation
    assert not shared.training and getattr(shared, "_cached_continuous_batching_manager", None) is None


CONTROL = rc.Control(value(64), 3.0, 9)
REFUSED = {
    "one text": ((PROMPTS[0],), {}, TypeError, "prompts must be a list of texts, or of lists of token ids, found str"),
    "no prompts": (([],), {}, ValueError, "there are no prompts"),
    "a number": (([PROMPTS[0], 3],), {}, TypeError, "found 3 at 1"),
    "negative ids": (([[4, -5]],), {}, ValueError, r"prompts have tokens that the model does not have, it knows 0 to 97: 0 \(token -5\)"),
    "unknown ids": ((["a", [4, 98, 500]],), {}, ValueError, r"it knows 0 to 97: 1 \(token 500\)"),
    "an empty prompt": ((["a", "", []],), {}, ValueError, "2 prompts have no tokens: 1, 2"),
    "a prompt too long": ((["a", "b" * 60],), {}, ValueError, r"1 prompts leave no room for 14 new tokens in a context of 64: 1 \(60 tokens\)"),
    "too few controls": ((PROMPTS, [CONTROL]), {}, ValueError, "there are 8 prompts, found 1 controls"),
    "a controller": ((PROMPTS, rc.Controller(CONTROL.value)), {}, TypeError, "control must be a recontrol.Control, None, or a list of them.*found Controller"),
    "a value function": ((PROMPTS[:2], [None, CONTROL.value]), {}, TypeError, "found ValueFunction at 1"),
    "no new tokens": ((PROMPTS,), {"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of at least 1, found 0"),
    "a kind of batching": ((PROMPTS,), {"batching": "paged"}, ValueError, "batching must be one of 'auto', 'continuous', 'static', found 'paged'"),
    "a backend": ((PROMPTS, CONTROL), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    "beams": ((PROMPTS,), {"num_beams": 2}, ValueError, "num_beams=2 is not taken here: there is one response to a prompt"),
    "a cache": ((PROMPTS,), {"cache_implementation": "static"}, ValueError, "there is recontrol.StaticDecoder"),
    "beams by config": ((PROMPTS,), {"generation_config": GenerationConfig(num_beams=2)}, ValueError, "generation config asks for num_beams=2"),
    "a budget of nothing": ((PROMPTS,), {"cache_budget": 0}, ValueError, "a size must be above 0 bytes"),
    "a budget below a block": ((PROMPTS,), {"cache_budget": 100}, ValueError, "a cache budget of 100 bytes is less than one block of 16 tokens, 8192 bytes"),
    "a row too long": ((PROMPTS,), {"cache_budget": 8200, "batching": "static"}, ValueError, "key/value cache of 6 entries does not fit into 8200 bytes"),
    "an empty stop string": ((PROMPTS,), {"stop_strings": [""]}, ValueError, "stop_strings must be texts that are not empty"),
    "another size": (
        (PROMPTS, rc.Control(rc.ValueFunction(16, (8,)))),
        {},
        ValueError,
        "hidden states of size 16, the output embedding of this .* reads size 32",
    ),
    "another dtype": ((PROMPTS, rc.Control(rc.ValueFunction(32, (8,)))), {}, TypeError, "float64 goes with float64 only"),
}


@pytest.mark.parametrize("arguments, options, error, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(arguments, options, error, message, model):
    with pytest.raises(error, match=message):
        generate(model, *arguments, **options)


@continuous_only
def test_blocks_too_few_are_refused(model):
    with pytest.raises(ValueError, match=r"6 prompts do not fit into 1 blocks of 16 tokens even alone: 0 \(27 tokens\)"):
        generate(model, cache_budget=8200)


def test_a_controller_that_is_attached_is_not_doubled(model):
    with rc.Controller(CONTROL.value).attach(model), pytest.raises(RuntimeError, match="a Controller, or what else edits states, is attached"):
        generate(model, control=CONTROL)


def test_a_value_function_of_another_model_is_refused_unless_allowed(model):
    other = double_llama(seed=4)
    known = value(8)
    known.provenance["base_model"] = model_fingerprint(model)
    foreign = value(8)
    foreign.provenance["base_model"] = model_fingerprint(other)
    for each in (foreign, 0.5 * known + 0.5 * foreign):
        with pytest.raises(ValueError, match="trained for another model"):
            generate(model, control=[None] * 7 + [rc.Control(each)])
        assert len(generate(model, PROMPTS[:1], rc.Control(each), allow_other_model=True)) == 1
    assert len(generate(model, PROMPTS[:1], rc.Control(0.5 * known), batching="static")) == 1


# Options that transformers' continuous batching would pass over in silence.
NOT_CONTINUOUS = {
    "an option": ({"repetition_penalty": 1.3}, "takes no repetition_penalty"),
    "a limit": ({"min_new_tokens": 3}, "takes no min_new_tokens"),
    "a limit of the config": ({"generation_config": GenerationConfig(min_new_tokens=3)}, "asks for min_new_tokens"),
    "a config": ({"generation_config": GenerationConfig(repetition_penalty=1.3)}, "asks for RepetitionPenaltyLogitsProcessor"),
}


@continuous_only
@pytest.mark.parametrize("options, reason", NOT_CONTINUOUS.values(), ids=NOT_CONTINUOUS)
def test_what_cannot_be_continuous_is_static_or_refused(options, reason, model, caplog):
    with pytest.raises(ValueError, match=f"batching='continuous' cannot be had here: .*{reason}"):
        generate(model, batching="continuous", **options)
    with caplog.at_level(logging.INFO, "recontrol"):
        responses = generate(model, PROMPTS[:2], CONTROL, **options)
    assert reason in caplog.text and [response.batching for response in responses] == ["static"] * 2
    wanted = [alone(model, prompt, CONTROL, **options) for prompt in PROMPTS[:2]]
    assert [response.token_ids for response in responses] == wanted


@continuous_only
def test_models_without_attention_are_static():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 98, "state_size": 4, "pad_token_id": 0, "eos_token_id": 2}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="the attention of MambaForCausalLM cannot be exchanged"):
        generate(model, batching="continuous")
    # Its cache is of no size that a budget could be held against.
    with pytest.raises(ValueError, match="cannot be told from MambaConfig"):
        generate(model, cache_budget="1GB")
    responses = generate(model, control=rc.Control(value(64).float(), 3.0, 9), batch_size=3)
    assert {response.batching for response in responses} == {"static"} and len(responses) == len(PROMPTS)


@continuous_only
def test_sliding_windows_are_static_in_releases_that_get_them_wrong(monkeypatch):
    model = double_llama()
    model.config.sliding_window = 8
    monkeypatch.setattr(continuous, "release", lambda: (5, 16))
    with pytest.raises(ValueError, match=r"gets sliding windows wrong in continuous batches \(they are right from 5.17 on\)"):
        generate(model, batching="continuous")


def test_releases_without_continuous_batching_are_static(model, monkeypatch):
    monkeypatch.setattr(continuous, "release", lambda: (5, 0))
    assert generate(model, PROMPTS[:1])[0].batching == "static"
    with pytest.raises(ValueError, match=r"transformers \S+ has no continuous batching of the kind that is known here.*use batching='static'"):
        generate(model, PROMPTS[:1], batching="continuous")


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_the_model_is_told(batching, stream, model):
    Failing(model.model.layers[1], ArithmeticError("no such number"), 3)
    with pytest.raises((RuntimeError, ArithmeticError), match="no such number"):
        list(generate(model, control=CONTROL, batching=batching, stream=stream, trace=True))
    # And the next is as if nothing had been.
    assert generate(model, PROMPTS[:1], CONTROL, batching=batching)[0].token_ids == alone(model, PROMPTS[0], CONTROL)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_states_that_are_not_finite_stay_unedited_and_are_told_once(batching, caplog):
    model = double_llama()
    spoiled = []

    def spoil(module, args, output):
        spoiled.append(0)
        return output * float("nan") if len(spoiled) > 5 else output

    model.model.norm.register_forward_hook(spoil)
    responses = generate(model, control=CONTROL, batching=batching, max_new_tokens=6, eos_token_id=2)
    assert all(len(response.token_ids) == 6 for response in responses)
    # Three calls prove at the start that edits reach the logits; two are sound.
    found = [record.getMessage() for record in caplog.records if "stay unedited" in record.getMessage()]
    assert found == [f"{4 * len(PROMPTS)} states stay unedited: they, or what the ascent makes of them, are not finite; a smaller step_size may help"]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_ctrl_c(batching, model):
    """In the main thread, while another one decodes."""
    handle = model.model.register_forward_hook(lambda module, args, output: calls.append(0) or (_thread.interrupt_main() if len(calls) == 6 else None))
    calls = []
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPTS[:6], CONTROL, batching=batching, max_new_tokens=30, eos_token_id=2)
    finally:
        handle.remove()
    # 3 calls prove at the start that edits reach the logits; of the rest few are made after the signal.
    assert 6 <= len(calls) < 25


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_stream_may_be_left(batching, model):
    stream = generate(model, PROMPTS[:6], CONTROL, batching=batching, stream=True, max_new_tokens=30, eos_token_id=2)
    assert hooks_on(model) == []
    next(stream)
    assert hooks_on(model) != []
    stream.close()
    assert hooks_on(model) == [] and decoding_threads() == []
    with contextlib.closing(generate(model, batching=batching, stream=True)):
        pass


@continuous_only
def test_a_persistent_manager_is_not_taken_over(model):
    model._cached_continuous_batching_manager = object()
    try:
        with pytest.raises(ValueError, match="call its destroy_cached_continuous_batching_manager"):
            generate(model, batching="continuous")
    finally:
        del model._cached_continuous_batching_manager


def test_a_tokenizer_is_needed_for_texts_only(model):
    class Decoder:
        pad_token_id, eos_token_id = 0, 2
        decode = TOKENIZER.decode

    assert rc.generate(model, Decoder(), [[40, 41]], max_new_tokens=2, eos_token_id=2)[0].finish == "length"
