"""What the config of a model says: its context, the padding of what it wraps, and the bytes of its cache, family by family."""

import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    MusicgenConfig,
    OPTConfig,
    RobertaConfig,
    RwkvConfig,
    XLNetConfig,
)

from recontrol.decoding.model_config import (
    cache_bytes_per_token,
    context_length,
    padding_token,
    set_padding_token,
    state_width,
    text_config,
    vocabulary_size,
)

BF16 = torch.bfloat16


def llama(context, **rope):
    return LlamaConfig(max_position_embeddings=context, rope_parameters={"rope_theta": 1e4, **rope})


LLAMA_3 = {"factor": 32.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI_3 = {"factor": 32.0, "original_max_position_embeddings": 4096, "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}
BY_KIND = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
CONTEXTS = {
    "Llama 2": (llama(4096, rope_type="default"), 4096),
    "Vicuna 16k, linear": (llama(4096, rope_type="linear", factor=4.0), 16_384),
    "dynamic": (llama(2048, rope_type="dynamic", factor=2.0), 4096),
    "Qwen 2.5, YaRN": (llama(32_768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768), 131_072),
    "DeepSeek V3, YaRN": (llama(163_840, rope_type="yarn", factor=40.0, original_max_position_embeddings=4096), 163_840),
    "Llama 3.2, whose factor says more than it has": (llama(131_072, rope_type="llama3", **LLAMA_3), 131_072),
    "Phi 3, LongRoPE": (llama(131_072, rope_type="longrope", **PHI_3), 131_072),
    "Gemma 3, linear by kind of layer": (Gemma3TextConfig(max_position_embeddings=131_072, rope_parameters=BY_KIND), 131_072),
    "Gemma 3 with eyes": (Gemma3Config(text_config={"max_position_embeddings": 2048}), 2048),
    "OPT": (OPTConfig(max_position_embeddings=2048), 2048),
    "RoBERTa, which counts from its padding": (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    "MPT, a table of biases": (MptConfig(max_seq_len=2048), 2048),
    "Falcon": (FalconConfig(max_position_embeddings=2048), 2048),
    "Falcon, ALiBi": (FalconConfig(alibi=True), None),
    "Bloom": (BloomConfig(seq_length=4096), None),
    "RWKV": (RwkvConfig(), None),
    "Mamba": (MambaConfig(), None),
    "XLNet, which says -1": (XLNetConfig(), None),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_is_what_the_model_takes(name):
    config, expected = CONTEXTS[name]
    assert context_length(config) == expected


GEMMA_4 = {"num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": None}


JAMBA = {"num_hidden_layers": 8, "attn_layer_period": 8, "attn_layer_offset": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "settings", "numbers"),
    [
        # Five layers of 8 numbers a head and one of 16.
        ("Gemma4TextConfig", {**GEMMA_4, "num_kv_shared_layers": 0}, 2 * 2 * (5 * 8 + 16)),
        ("Gemma4Config", {"text_config": {**GEMMA_4, "num_kv_shared_layers": 0}}, 2 * 2 * (5 * 8 + 16)),
        ("JambaConfig", JAMBA, 2 * 2 * 8),
    ],
)
def test_layers_are_counted_each_by_its_own_sizes(name, settings, numbers):
    if not hasattr(transformers, name):
        pytest.skip(f"this release of transformers has no {name}")
    assert cache_bytes_per_token(getattr(transformers, name)(**settings), BF16) == 2 * numbers


def test_latent_attention_keeps_latents(monkeypatch):
    config = DeepseekV3Config(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
    monkeypatch.setattr("recontrol.decoding.model_config._caches_latents", lambda: True)
    assert cache_bytes_per_token(config, BF16) == 3 * (512 + 64) * 2
    monkeypatch.setattr("recontrol.decoding.model_config._caches_latents", lambda: False)
    assert cache_bytes_per_token(config, BF16) == 3 * 4 * (192 + 128) * 2


def test_recurrent_layers_alone_have_no_cache_of_keys():
    with pytest.raises(ValueError, match="cannot be told from MambaConfig: found no layer that keeps keys and values; use batch_size"):
        cache_bytes_per_token(MambaConfig(num_hidden_layers=2), BF16)


def test_padding_is_set_where_models_look_for_it():
    config = Gemma3Config(text_config={"pad_token_id": None}, pad_token_id=None)
    assert padding_token(config) is None
    set_padding_token(config, 7)
    assert (config.pad_token_id, config.text_config.pad_token_id, padding_token(config)) == (7, 7, 7)
    config.pad_token_id = 5
    assert padding_token(config) == 7


def test_the_language_model_of_a_model_with_more():
    config = Gemma3Config(text_config={"vocab_size": 99, "hidden_size": 24})
    assert text_config(config) is config.text_config and (vocabulary_size(config), state_width(config)) == (99, 24)
    assert text_config(MusicgenConfig()).model_type == "musicgen_decoder"


def test_a_state_that_is_projected_has_the_width_of_the_projection():
    assert state_width(OPTConfig(hidden_size=1024, word_embed_proj_dim=512)) == 512
