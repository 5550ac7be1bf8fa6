"""Control of every kind of model: the logits are those that the model's own head computes from the edited states.

The oracle is a plain hook that puts `oracle.ascend(h)` in the place of h; what follows in the model (bias, scaling,
soft-capping, the output projection of OPT) is then the model's own. With backend="oracle" the two must agree to the bit.
"""

import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache

import recontrol as rc
from recontrol.decoding.controller import CACHE_NAMES, Controller

VOCABULARY = 101
EOS = 2
STEP_SIZE, STEPS = 2.0, 20
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
OPT = {**SMALL, "ffn_dim": 48}

# name: (prefix of the classes, config)
MODELS = {
    "llama": ("Llama", GATED),
    "llama tied": ("Llama", {**GATED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GATED, "sliding_window": 4}),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 8}),
    "gpt2": ("GPT2", GPT),
    "gptj, bias in the head": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", {**SMALL, "intermediate_size": 48}),
    "falcon": ("Falcon", SMALL),
    "phi, bias in the head": ("Phi", {**SMALL, "intermediate_size": 48}),
    "gemma2, soft-capped logits": ("Gemma2", {**GATED, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "cohere, scaled logits": ("Cohere", {**GATED, "logit_scale": 0.25}),
    "opt": ("OPT", OPT),
    "opt, projected states": ("OPT", {**OPT, "word_embed_proj_dim": 24}),
    "mamba, recurrent": ("Mamba", {**SMALL, "state_size": 4}),
}
PROMPT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    prefix, options = MODELS[request.param]
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{prefix}Config")(**options)).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        # Initialised to zero, it could be forgotten without a trace.
        if head.bias is not None:
            head.bias.normal_()
    return model


@pytest.fixture(scope="module")
def value(model):
    torch.manual_seed(1)
    return rc.ValueFunction(model.get_output_embeddings().in_features, (64,))


class Substitution:
    """A plain hook that puts the oracle's states in the place of all states, and keeps both."""

    def __init__(self, model, value):
        self.value, self.states = value, []
        self.handle = model.get_output_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, args):
        rows = args[0].reshape(-1, args[0].shape[-1])
        self.states.append(rows)
        return (rc.oracle.ascend(rows, self.value, STEP_SIZE, STEPS).reshape(args[0].shape),)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.handle.remove()


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def controller(value, **options):
    return Controller(value, STEP_SIZE, STEPS, **options)


def with_cache(model, cache, ids):
    name = next(name for name in CACHE_NAMES if name in inspect.signature(type(model).forward).parameters)
    return logits_of(model, input_ids=ids, use_cache=True, **{name: cache})


def test_logits_are_those_of_the_head_for_the_states_of_the_oracle(model, value):
    free = logits_of(model, input_ids=PROMPT)
    with Substitution(model, value) as substitution:
        expected = logits_of(model, input_ids=PROMPT)
    with controller(value, backend="oracle").attach(model) as handle:
        controlled = logits_of(model, input_ids=PROMPT)
    assert torch.equal(controlled, expected) and not torch.equal(controlled, free)
    assert handle.edited_rows == PROMPT.numel() == len(substitution.states[0])
    with controller(value).attach(model):
        torch.testing.assert_close(logits_of(model, input_ids=PROMPT), expected)
    assert torch.equal(logits_of(model, input_ids=PROMPT), free)


def test_the_edit_is_seen_in_the_logits_and_raises_the_value(model, value):
    """The comparison above could not fail if the edit were too small to matter."""
    with Substitution(model, value) as substitution:
        expected = logits_of(model, input_ids=PROMPT)
    free = logits_of(model, input_ids=PROMPT)
    assert (expected - free).abs().max() > 0.1 * free.abs().max()
    states = substitution.states[0]
    assert (value(rc.ascend(states, value, STEP_SIZE, STEPS)) > value(states)).all()


def test_greedy_generation_samples_from_the_edited_states(model, value):
    options = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with Substitution(model, value) as substitution:
        expected = model.generate(PROMPT, **options)
    with controller(value, backend="oracle", stop_token_ids=()).attach(model) as handle:
        controlled = model.generate(PROMPT, **options)
    assert torch.equal(controlled.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(controlled.logits, expected.logits, strict=True))
    # One row a sequence and step, at prefill too.
    assert [len(states) for states in substitution.states] == [3] * len(expected.logits)
    assert handle.edited_rows == 3 * len(expected.logits)
    free = model.generate(PROMPT, **options)
    assert not torch.equal(controlled.logits[0], free.logits[0])


def test_finished_rows_are_untouched_at_decode_steps_and_only_there(model, value):
    step = torch.tensor([[EOS], [20], [0]])
    runs = {}
    for name, control in {"free": None, "controlled": controller(value, backend="oracle", stop_token_ids=(EOS, 0))}.items():
        handle = control.attach(model) if control else None
        cache = DynamicCache(config=model.config)
        prefill = with_cache(model, cache, step)
        runs[name] = prefill, with_cache(model, cache, step)
        if handle:
            handle.detach()
    with Substitution(model, value):
        cache = DynamicCache(config=model.config)
        edited = with_cache(model, cache, step), with_cache(model, cache, step)
    (_, free), (prefill, decode) = runs["free"], runs["controlled"]
    assert torch.equal(prefill, edited[0])
    assert torch.equal(decode[1], edited[1][1])
    assert torch.equal(decode[[0, 2]], free[[0, 2]]) and not torch.equal(decode[1], free[1])
    assert handle.edited_rows == 3 + 1


def test_a_value_function_of_another_size_is_refused(model):
    width = model.get_output_embeddings().in_features
    with pytest.raises(ValueError, match=f"for hidden states of size {width + 1}, the output embedding of this {type(model).__name__} reads size {width}"):
        Controller(rc.ValueFunction(width + 1, (8,))).attach(model)
