"""Fingerprints: the same weights in any dtype are the same model, other weights are not, and wrappers do not matter."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from recontrol.decoding.fingerprint import MATRICES, OUTPUT_EMBEDDING, difference, fingerprint_hash, model_fingerprint

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 2, **changes})).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def test_a_model_is_itself_and_json_keeps_that(model):
    recorded = json.loads(json.dumps(model_fingerprint(model)))
    assert difference(recorded, model) is None
    assert recorded["model_type"] == "llama" and recorded["hidden_size"] == 32 and recorded["vocab_size"] == 97
    assert len(recorded["samples"][OUTPUT_EMBEDDING]) == 32
    assert recorded["samples"].keys() - {OUTPUT_EMBEDDING} == {
        name for name, parameter in model.named_parameters() if parameter.dim() == 2 and name != "lm_head.weight"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_does_not_matter(model, dtype):
    other = copy.deepcopy(model).to(dtype)
    assert difference(model_fingerprint(model), other) is None
    assert difference(model_fingerprint(other), model) is None


def test_other_weights_are_another_model(model):
    message = difference(model_fingerprint(llama(seed=1)), model)
    assert message.startswith("the weights differ from those of the recorded model: in ") and "was wanted" in message


def test_one_fine_tuned_matrix_is_seen_and_named(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.01
    assert "in model.layers.1.mlp.up_proj.weight " in difference(model_fingerprint(model), other)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_embeddings_are_sampled(model, name):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).weight += 0.01
    assert difference(model_fingerprint(model), other) is not None


@pytest.mark.parametrize(
    ("change", "field"), [({"hidden_size": 64}, "hidden_size"), ({"vocab_size": 98}, "vocab_size"), ({"num_hidden_layers": 3}, "num_hidden_layers")]
)
def test_sizes_are_named(model, change, field):
    message = difference(model_fingerprint(model), llama(**change))
    assert message == f"{field} is {change[field]}, that of the recorded model is {model_fingerprint(model)[field]}"


def test_architectures_are_named(model):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    assert difference(model_fingerprint(gpt2), model) == "model_type is llama, that of the recorded model is gpt2"


def test_the_name_is_told_but_not_compared(model):
    recorded = model_fingerprint(model)
    renamed = {**recorded, "name": "someone/else"}
    assert difference(renamed, model) is None and fingerprint_hash(renamed) == fingerprint_hash(recorded)
    assert "that of someone/else is 32" in difference(renamed, llama(hidden_size=64))


def test_a_missing_layer_is_another_model(model):
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:1]
    assert "no weight model.layers.1." in difference(model_fingerprint(model), cut)


def test_tied_embeddings():
    tied = llama(tie_word_embeddings=True)
    recorded = model_fingerprint(tied)
    assert OUTPUT_EMBEDDING in recorded["samples"] and "model.embed_tokens.weight" not in recorded["samples"]
    assert difference(recorded, tied) is None
    assert difference(recorded, llama(seed=1, tie_word_embeddings=True)) is not None


def test_compiled_and_wrapped_models_are_the_same_model(model):
    class Wrapper(nn.Module):
        """As adapters wrap: attributes are those of the model inside."""

        def __init__(self, inner):
            super().__init__()
            self.base_model = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base_model"), name)

    recorded = model_fingerprint(model)
    for wrapped in (torch.compile(model), Wrapper(model)):
        assert difference(recorded, wrapped) is None
        assert model_fingerprint(wrapped) == recorded


def test_adapters_do_not_matter(model):
    adapted = copy.deepcopy(model)
    projection = adapted.model.layers[0].mlp.up_proj

    class Lora(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer
            self.lora_A = nn.Linear(32, 2, bias=False)

    adapted.model.layers[0].mlp.up_proj = Lora(projection)
    assert difference(model_fingerprint(model), adapted) is None
    assert model_fingerprint(adapted) == model_fingerprint(model)


def test_quantised_weights_are_passed_over_but_others_are_not(model):
    quantised = copy.deepcopy(model)
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    assert difference(model_fingerprint(model), quantised) is None
    assert "model.layers.0.mlp.up_proj.weight" not in model_fingerprint(quantised)["samples"]
    assert difference(model_fingerprint(llama(seed=1)), quantised) is not None


def test_a_deep_model_is_sampled_to_its_last_layer():
    deep = llama(num_hidden_layers=24)
    samples = model_fingerprint(deep)["samples"]
    assert len(samples) == MATRICES + 1
    # 24 layers of 7 matrices and the input embedding, every third or so of them: no layer goes unseen.
    assert {name.split(".")[2] for name in samples if "layers" in name} == {str(layer) for layer in range(24)}


def test_the_hash_tells_models_apart(model):
    assert fingerprint_hash(model_fingerprint(model)) == fingerprint_hash(model_fingerprint(llama()))
    assert fingerprint_hash(model_fingerprint(model)) != fingerprint_hash(model_fingerprint(llama(seed=1)))
    assert len(fingerprint_hash(model_fingerprint(model))) == 64


def test_nothing_but_a_language_model_has_a_fingerprint(model):
    with pytest.raises(TypeError, match="found Linear"):
        model_fingerprint(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"LlamaModel\.get_output_embeddings\(\) gives None"):
        model_fingerprint(LlamaModel(model.config))
