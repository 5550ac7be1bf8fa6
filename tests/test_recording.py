"""Recorded states are those whose logits sample the next token, in eager and in compiled models, and recording leaves no trace."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from recontrol.decoding.recording import record_hidden_states

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
PADDED = torch.tensor([[0, 0, 11], [8, 9, 10]])
MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def last_states(model, ids, mask=None):
    """The states after the final norm by another way: the model below the head, without a cache."""
    with torch.no_grad():
        return model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state


def generate(model, ids=IDS, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize(("ids", "mask"), [(IDS, None), (PADDED, MASK)])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"do_sample": True}], ids=["greedy", "static", "sampling"])
def test_entry_t_is_the_state_whose_logits_sampled_token_t(model, ids, mask, options):
    with record_hidden_states(model) as recorder:
        out = generate(model, ids, mask, **options)
    assert len(recorder.steps) == 5 and {step.shape for step in recorder.steps} == {(2, 32)}
    whole = last_states(model, out.sequences, None if mask is None else torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1))
    for step, (state, logits) in enumerate(zip(recorder.steps, out.logits, strict=True)):
        assert torch.equal(model.lm_head(state), logits)
        torch.testing.assert_close(state, whole[:, ids.shape[1] - 1 + step], rtol=1e-4, atol=1e-5)
        if not options.get("do_sample"):
            assert torch.equal(model.lm_head(state).argmax(-1), out.sequences[:, ids.shape[1] + step])


def test_only_the_last_position_is_kept_when_logits_of_all_are_computed(model):
    with record_hidden_states(model) as recorder, torch.no_grad():
        model(IDS)
        model(IDS, logits_to_keep=1)
    every, one = recorder.steps
    assert every.shape == one.shape == (2, 32)
    assert torch.equal(every, last_states(model, IDS)[:, -1]) and torch.equal(every, one)
    assert every.untyped_storage().nbytes() == every.numel() * every.element_size()


def test_states_are_copies_in_the_dtype_of_the_model(model):
    torch.manual_seed(0)
    half = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4)).to(torch.bfloat16).eval()
    seen = []
    # A hook that was there before and changes the state in place does so after the copy was made.
    hook = half.lm_head.register_forward_pre_hook(lambda module, args: (seen.append(args[0].clone()), args[0].zero_())[0])
    with record_hidden_states(half) as recorder, torch.no_grad():
        half(IDS)
    hook.remove()
    assert recorder.steps[0].dtype == torch.bfloat16 and not recorder.steps[0].requires_grad
    assert torch.equal(recorder.steps[0], seen[0][:, -1]) and recorder.steps[0].any()


def test_clear_and_pause(model):
    with record_hidden_states(model) as recorder, torch.no_grad():
        model(IDS)
        recorder.clear()
        assert recorder.steps == []
        with recorder.pause():
            model(IDS)
        assert recorder.steps == []
        model(IDS)
        assert len(recorder.steps) == 1


def test_two_recorders_see_the_same(model):
    with record_hidden_states(model) as one, record_hidden_states(model) as two, torch.no_grad():
        model(IDS)
    assert torch.equal(one.steps[0], two.steps[0])


def test_nothing_is_left_behind(model):
    before = generate(model)
    with pytest.raises(ZeroDivisionError), record_hidden_states(model) as recorder:
        generate(model, max_new_tokens=2)
        raise ZeroDivisionError
    assert len(recorder.steps) == 2
    assert not model.lm_head._forward_pre_hooks and not recorder.attached
    after = generate(model)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert len(recorder.steps) == 2


def test_recording_changes_no_logits(model):
    free = generate(model)
    with record_hidden_states(model):
        recorded = generate(model)
    assert all(torch.equal(a, b) for a, b in zip(free.logits, recorded.logits, strict=True))


@pytest.mark.parametrize("first", ["compiled", "recording"])
def test_compiled_models_record_and_stop_recording(model, first):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = last_states(model, IDS)[:, -1]
        if first == "compiled":
            compiled(IDS)
        with record_hidden_states(model) as recorder:
            # More often than the compiler would recompile, if every call had its own guards.
            for _ in range(12):
                compiled(IDS)
        compiled(IDS)
    assert len(recorder.steps) == 12
    assert all(torch.equal(step, expected) for step in recorder.steps)


def test_the_compiled_operation_is_sound(model):
    with record_hidden_states(model) as recorder:
        torch.library.opcheck(torch.ops.recontrol.record, (torch.randn(3, 32), torch.zeros((), dtype=torch.int64), recorder._key))
    # A recorder that is gone is no error: compiled code may outlive it.
    torch.ops.recontrol.record(torch.randn(3, 32), torch.zeros((), dtype=torch.int64), 10**9)


def test_only_causal_language_models_are_recorded():
    with pytest.raises(TypeError, match="found Identity"), record_hidden_states(torch.nn.Identity()):
        pass
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, which has an encoder"), record_hidden_states(encoder_decoder):
        pass
