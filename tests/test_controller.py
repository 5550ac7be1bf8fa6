"""The life of a controller on a model: what is refused, what is proved, and that nothing stays behind.

What it does to states is in test_controller_states.py, what it does to generation in test_controller_generation.py.
"""

import copy
import json
import re

import numpy as np
import pytest
import torch
from controlled import Failing, hooks_on, llama, unchanged, value_function
from test_controller_models import GATED, PROMPT, STEP_SIZE, STEPS, controller, logits_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from recontrol.decoding.controller import Controller, Handle
from recontrol.decoding.fingerprint import model_fingerprint

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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_size": float("nan")}, ValueError, "step_size must be finite and 0 or more, found nan"),
        ({"step_size": float("inf")}, ValueError, "step_size must be finite and 0 or more, found inf"),
        ({"step_size": 10**400}, ValueError, "step_size must be finite and 0 or more, found a number too large for a float"),
        ({"step_size": -0.5}, ValueError, "step_size must be finite and 0 or more, found -0.5"),
        ({"step_size": True}, TypeError, "step_size must be a number, found True"),
        ({"step_size": "0.5"}, TypeError, "step_size must be a number, found '0.5'"),
        ({"step_size": None}, TypeError, "step_size must be a number, found None"),
        ({"steps": -1}, ValueError, "steps must be 0 or more, found -1"),
        ({"steps": 2**31}, ValueError, "steps must be at most 2147483647, found 2147483648"),
        ({"steps": 3.0}, TypeError, "steps must be an integer, found 3.0"),
        ({"steps": True}, TypeError, "steps must be an integer, found True"),
        ({"radius": float("nan")}, ValueError, "radius must be finite and 0 or more, found nan"),
        ({"radius": -1}, ValueError, "radius must be finite and 0 or more, found -1"),
        ({"radius": False}, TypeError, "radius must be a number, found False"),
        ({"target": float("nan")}, ValueError, "target must be finite, found nan"),
        ({"target": float("-inf")}, ValueError, "target must be finite, found -inf"),
        ({"target": True}, TypeError, "target must be a number, found True"),
        ({"head_weights": (1.0, 2.0)}, ValueError, "head_weights must be 1 numbers, one a head, found 2"),
        ({"head_weights": ()}, ValueError, "head_weights must be 1 numbers, one a head, found 0"),
        ({"head_weights": (float("nan"),)}, ValueError, "head_weights must be finite, found nan"),
        ({"head_weights": (True,)}, TypeError, "head_weights must be a number, found True"),
        ({"head_weights": 1.0}, TypeError, "head_weights must be a sequence of numbers, found 1.0"),
        ({"stop_token_ids": (2, -1)}, ValueError, "stop_token_ids must be 0 or more, found -1"),
        ({"stop_token_ids": (2.0,)}, TypeError, "stop_token_ids must be integers, found 2.0"),
        ({"stop_token_ids": (False,)}, TypeError, "stop_token_ids must be integers, found False"),
        ({"stop_token_ids": 2}, TypeError, "stop_token_ids must be a sequence of numbers, found 2"),
        ({"stop_token_ids": "</s>"}, TypeError, "stop_token_ids must be a sequence of numbers, found '</s>'"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'; choose one of 'auto', 'cpu', 'torch', 'cuda', 'triton', 'oracle'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_there_is_a_model(value, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Controller(value, **options)


def test_only_a_value_function_is_climbed():
    with pytest.raises(TypeError, match=r"value must be a recontrol\.ValueFunction, found Linear"):
        Controller(nn.Linear(32, 1))


def test_several_heads_need_weights():
    with pytest.raises(ValueError, match="the value function has 3 heads: give head_weights, 3 numbers"):
        Controller(value_function(32, 64, heads=3))


def test_numbers_of_other_libraries_become_plain_ones(value):
    made = Controller(value, np.float32(0.5), np.int64(3), radius=2, head_weights=torch.tensor([1.0]), stop_token_ids=np.array([2, 0]))
    found = made.step_size, made.steps, made.radius, made.head_weights, made.stop_token_ids
    assert found == (0.5, 3, 2.0, (1.0,), (2, 0))
    assert [type(number) for number in (*found[:3], *found[3], *found[4])] == [float, int, float, float, int, int]


@pytest.mark.parametrize("width", [31, 33, 64])
def test_a_value_function_of_another_size_is_refused(model, width):
    message = f"the value function is for hidden states of size {width}, the output embedding of this LlamaForCausalLM reads size 32"
    with pytest.raises(ValueError, match=message):
        Controller(value_function(width)).attach(model)


@pytest.mark.parametrize(("of_model", "of_value"), [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)])
def test_float64_goes_with_float64_only(of_model, of_value):
    model, value = llama().to(of_model), value_function(32).to(of_value)
    with pytest.raises(TypeError, match=f"float64 goes with float64 only: the model is {of_model}, the value function is {of_value}"):
        Controller(value).attach(model)
    assert hooks_on(model) == []


def test_a_value_function_on_another_device_is_refused(model):
    with pytest.raises(ValueError, match=r"the value function is on meta, the output embedding on cpu; move one of them, as by value.to\('cpu'\)"):
        Controller(value_function(32).to("meta")).attach(model)


def test_a_backend_that_cannot_run_is_refused_at_attach(model):
    deep = value_function(32, 8, 8, 8)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: it has kernels for two and three linear layers, this value function has 4"):
        Controller(deep, backend="cpu").attach(model)
    assert hooks_on(model) == []
    with Controller(deep, backend="torch").attach(model) as handle:
        logits_of(model, input_ids=PROMPT)
    assert handle.edited_rows == PROMPT.numel()


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (nn.Linear(32, 32), TypeError, r"a causal language model of transformers is wanted, one with get_output_embeddings\(\); found Linear"),
        ("someone/model", TypeError, "found str"),
        (LlamaModel(LlamaConfig(**GATED)), ValueError, r"LlamaModel.get_output_embeddings\(\) gives None: this model computes no logits over a vocabulary"),
        (
            T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=32, d_ff=8, d_kv=4, num_layers=1, num_heads=2)),
            ValueError,
            "T5ForConditionalGeneration, which has an encoder",
        ),
    ],
    ids=["no model", "a name", "no head", "encoder-decoder"],
)
def test_what_is_no_decoder_only_language_model_is_refused(value, other, error, message):
    with pytest.raises(error, match=message):
        Controller(value).attach(other)
    assert not isinstance(other, nn.Module) or hooks_on(other) == []


def test_a_second_controller_is_refused_and_the_first_goes_on(model, value):
    with controller(value, backend="oracle").attach(model):
        before = logits_of(model, input_ids=PROMPT)
        for same in (model, torch.compile(model, backend="eager")):
            with pytest.raises(RuntimeError, match="what else edits states, is attached to this LlamaForCausalLM already; detach it first, or leave its with"):
                Controller(value_function(32, 8)).attach(same)
        assert torch.equal(logits_of(model, input_ids=PROMPT), before)
    with Controller(value_function(32, 8), STEP_SIZE, STEPS).attach(model):
        assert not torch.equal(logits_of(model, input_ids=PROMPT), before)


def test_a_value_function_that_was_trained_for_another_model_is_refused(model):
    recorded = json.loads(json.dumps(model_fingerprint(llama(seed=1))))
    value = value_function(32, provenance={"base_model": {**recorded, "name": "someone/else"}})
    message = (
        "^the value function was trained for another model: the weights differ from those of someone/else: in .*; attach it anyway with allow_other_model=True$"
    )
    with pytest.raises(ValueError, match=message):
        controller(value).attach(model)
    assert hooks_on(model) == []
    free = logits_of(model, input_ids=PROMPT)
    with controller(value, allow_other_model=True).attach(model):
        assert not torch.equal(logits_of(model, input_ids=PROMPT), free)


def test_sizes_of_another_model_are_named(model):
    value = value_function(32, provenance={"base_model": model_fingerprint(llama(num_hidden_layers=3))})
    with pytest.raises(ValueError, match="num_hidden_layers is 2, that of the recorded model is 3"):
        Controller(value).attach(model)


@pytest.mark.parametrize("recorded", ["fingerprint", "name", "nothing"])
def test_the_model_that_a_value_function_was_trained_for_is_taken(model, recorded):
    provenance = {"fingerprint": {"base_model": model_fingerprint(model)}, "name": {"base_model": "a name proves nothing"}, "nothing": {}}[recorded]
    value = value_function(32, provenance=provenance)
    for same in (model, torch.compile(model, backend="eager"), copy.deepcopy(model).bfloat16()):
        with Controller(value, self_check=False).attach(same) as handle:
            assert handle.attached


class CopiedHead(LlamaForCausalLM):
    """Computes logits with a copy of the output embedding's weight, as models with fused heads do."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = nn.functional.linear(self.model(kwargs.get("input_ids", args[0] if args else None)).last_hidden_state, self.lm_head.weight.clone())
        return output


class NoiseOnly(LlamaForCausalLM):
    """Its logits differ from call to call, and not because of the state."""

    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        output = super().forward(*args, **kwargs)
        output.logits = torch.full_like(output.logits, float(self.calls % 3))
        return output


@pytest.mark.parametrize("kind", [CopiedHead, NoiseOnly])
def test_a_model_that_goes_round_its_output_embedding_is_refused(value, kind):
    model = llama(kind=kind)
    with pytest.raises(RuntimeError, match=rf"edits do not reach the logits: .* {kind.__name__} changed by .*, so it does not compute them through get_output"):
        controller(value).attach(model)
    assert hooks_on(model) == []


def test_without_the_self_check_such_a_model_is_taken_and_not_controlled(value):
    model = llama(kind=CopiedHead)
    free = logits_of(model, input_ids=PROMPT)
    with controller(value, self_check=False).attach(model) as handle:
        assert torch.equal(logits_of(model, input_ids=PROMPT), free)
    # The head was called, and its result thrown away.
    assert handle.edited_rows == PROMPT.numel()


def test_a_head_of_zeros_is_refused(value):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(RuntimeError, match=r"the logits of this LlamaForCausalLM changed by 0 \(and by 0 without\)"):
        controller(value).attach(model)


@pytest.mark.parametrize(("self_check", "calls"), [(True, 3), (False, 0)])
def test_the_self_check_runs_the_model_three_times_and_counts_nothing(model, value, self_check, calls):
    seen = []
    counter = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape))
    with controller(value, self_check=self_check).attach(model) as handle:
        assert seen == [(1, 1, model.config.vocab_size)] * calls and handle.edited_rows == 0
    counter.remove()


def test_the_self_check_leaves_generators_modes_and_gradients_alone(value):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, resid_pdrop=0.5, embd_pdrop=0.5))
    # With dropout the three runs of the check agree only if they draw the same numbers.
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    generators, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    with controller(value).attach(model):
        assert torch.equal(torch.get_rng_state(), generators) and torch.is_grad_enabled() == grad_mode
        assert [module.training for module in model.modules()] == before
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators)
    assert not torch.equal(model(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=["an error", "an interrupt"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_error_in_the_self_check_comes_through_and_leaves_nothing(model, value, error, call):
    hook = Failing(model.model.layers[0], error, call)
    with pytest.raises(type(error)):
        controller(value).attach(model)
    assert hook.left == 0 and hooks_on(model) == []


def test_leaving_the_block_restores_the_model(model, value):
    free = logits_of(model, input_ids=PROMPT)
    attributes = dict(vars(model))
    with controller(value).attach(model) as handle:
        assert isinstance(handle, Handle) and handle.attached and handle.controller.value is value
        assert not torch.equal(logits_of(model, input_ids=PROMPT), free)
        assert vars(model).keys() == attributes.keys()
    assert not handle.attached and hooks_on(model) == []
    assert torch.equal(logits_of(model, input_ids=PROMPT), free)
    handle.detach()
    with pytest.raises(RuntimeError, match="this Handle was detached; attach it again"):
        handle.__enter__()
    assert handle.edited_rows == PROMPT.numel()


def test_hooks_of_others_stay(model, value):
    free = logits_of(model, input_ids=PROMPT)
    seen = []
    before = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    handle = controller(value).attach(model)
    after = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen.clear()
    logits_of(model, input_ids=PROMPT)
    handle.detach()
    assert torch.equal(logits_of(model, input_ids=PROMPT), free)
    assert [torch.equal(states, seen[0]) for states in seen] == [True, False, True, True]
    before.remove()
    after.remove()


def test_an_inner_block_of_the_same_handle_ends_control(model, value):
    free = logits_of(model, input_ids=PROMPT)
    with controller(value).attach(model) as handle:
        with handle as same:
            assert same is handle and not torch.equal(logits_of(model, input_ids=PROMPT), free)
        assert torch.equal(logits_of(model, input_ids=PROMPT), free)


def test_blocks_on_two_models_do_not_mix(model, value):
    other = llama(seed=1)
    free = logits_of(other, input_ids=PROMPT)
    with controller(value).attach(model) as outer:
        with Controller(value_function(32, 8), STEP_SIZE, 3).attach(other) as inner:
            assert not torch.equal(logits_of(other, input_ids=PROMPT), free)
        assert torch.equal(logits_of(other, input_ids=PROMPT), free)
        logits_of(model, input_ids=PROMPT)
    assert inner.edited_rows == outer.edited_rows == PROMPT.numel()


def test_pause_leaves_the_hooks_without_effect(model, value):
    free = logits_of(model, input_ids=PROMPT)
    with controller(value).attach(model) as handle:
        controlled = logits_of(model, input_ids=PROMPT)
        with handle.pause():
            with handle.pause():
                assert torch.equal(logits_of(model, input_ids=PROMPT), free)
            assert torch.equal(logits_of(model, input_ids=PROMPT), free) and handle.attached
        assert handle.edited_rows == PROMPT.numel()
        assert torch.equal(logits_of(model, input_ids=PROMPT), controlled) and not torch.equal(controlled, free)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt(), SystemExit()], ids=["an error", "an interrupt", "an exit"])
@pytest.mark.parametrize("place", ["below the head", "at the head, before the edit", "at the head, after the edit", "before the model"])
def test_an_error_in_the_middle_of_generation_leaves_the_model_as_it_was(model, value, error, place):
    free = logits_of(model, input_ids=PROMPT)
    if place == "at the head, before the edit":
        # Three calls are the self-check's.
        hook = Failing(model.lm_head, error, 6)
    with pytest.raises(type(error)), controller(value).attach(model) as handle:
        if place != "at the head, before the edit":
            module = {"below the head": model.model.layers[1], "before the model": model}.get(place, model.lm_head)
            hook = Failing(module, error, 3)
        model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert hook.left == 0 and hooks_on(model) == [] and not handle.attached
    assert handle.edited_rows == 3 * (3 if place == "at the head, after the edit" else 2)
    assert torch.equal(logits_of(model, input_ids=PROMPT), free)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=["an error", "an interrupt"])
def test_a_controller_that_stays_attached_after_an_error_goes_on_as_a_fresh_one(model, value, error):
    options = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    # Every token ends a response: from the second step on, no row is live.
    control = controller(value, stop_token_ids=range(model.config.vocab_size))
    with control.attach(model) as handle:
        expected = model.generate(PROMPT, **options, eos_token_id=None)
        rows = handle.edited_rows
        hook = Failing(model.model.layers[1], error, 3)
        with pytest.raises(type(error)):
            model.generate(PROMPT, **options, eos_token_id=None)
        again = model.generate(PROMPT, **options, eos_token_id=None)
    assert hook.left == 0 and rows == 3 and handle.edited_rows == 3 * rows
    assert all(torch.equal(a, b) for a, b in zip(again.logits, expected.logits, strict=True))


def test_a_controlled_model_can_be_copied(model, value):
    with controller(value).attach(model):
        other = copy.deepcopy(model)
        controlled = logits_of(model, input_ids=PROMPT)
    assert torch.equal(logits_of(other, input_ids=PROMPT), controlled)
    assert not torch.equal(logits_of(model, input_ids=PROMPT), controlled)
