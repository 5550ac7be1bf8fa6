"""Every causal language model of the installed transformers, built small.

A recipe shrinks the default config of a model by the names of its fields (`SMALL`); `OVERRIDES` has what a model needs beside that, and `SKIPPED` why
a model is not built.
"""

import dataclasses
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, CONTEXT = 101, 32, 64
PAD, BOS, EOS = 0, 1, 2

SIZES = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim lru_width embedding_dim input_embedding_size",
    ),
    (24, "word_embed_proj_dim embedding_size output_embedding_size"),
    (
        48,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner dff dim_ff feed_forward_size intermediate_size_mlp "
        "dense_intermediate_size shared_intermediate_size",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_blocks "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k num_key_value_heads num_kv_heads swa_num_key_value_heads",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts linear_num_key_heads "
        "linear_num_value_heads linear_num_heads mamba_num_heads mamba_n_heads index_n_heads rotary_dim",
    ),
    (
        8,
        "head_dim kv_channels attention_head_size d_head dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim index_head_dim mamba_head_dim global_head_dim",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size mamba_d_head "
        "expert_ffn_hidden_size q_lora_rank kv_lora_rank hidden_size_per_layer_input mamba_d_state state_size ssm_state_size sliding_window "
        "sliding_window_size attention_window_size window_size local_attention attention_chunk_size mamba_chunk_size chunk_size router_hidden_size",
    ),
    (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace n_groups num_shared_experts n_shared_experts moe_num_shared_experts"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()} | {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

# Layers that keep states in different ways, both kinds of them.
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PATCHES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
TEXT = {**PATCHES, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "pad_token_id": PAD, "eos_token_id": EOS}

OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": LINEAR,
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV4ForCausalLM": {"num_key_value_heads": 1},
    "DoryForCausalLM": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "FuyuForCausalLM": {"text_config": {**TEXT, "num_key_value_heads": 4}, "image_size": 28, "patch_size": 14},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3ForConditionalGeneration": {"text_config": {**TEXT, "head_dim": 8, "sliding_window": 16, **SLIDING}, "vision_config": VISION},
    "Gemma3nForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING["layer_types"] * 2},
    "Gemma4ForCausalLM": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING["layer_types"] * 2, "global_head_dim": 16},
    "Gemma4UnifiedForCausalLM": {"num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2, "global_head_dim": 16},
    "GitForCausalLM": {"vision_config": VISION},
    "GraniteMoeHybridForCausalLM": {**LINEAR, "mamba_expand": 2},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": LINEAR,
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm3ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "MarianForCausalLM": {"forced_eos_token_id": None},
    "Qwen3NextForCausalLM": LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": LINEAR,
    "Qwen4ExpForCausalLM": {**LINEAR, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "RoCBertForCausalLM": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZambaForCausalLM": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32", "ffn_round_up_to_multiple_of": 8},
}
SKIPPED = {
    "BltForCausalLM": "transformers makes no cache for it: its config has no num_hidden_layers",
    "Gemma3nForConditionalGeneration": "the vision tower needs timm; Gemma3nForCausalLM is its language model",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM is its language model",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4UnifiedForCausalLM is its language model",
    "Gemma4AssistantForCausalLM": "it drafts for another model, whose states it reads",
    "Gemma4UnifiedAssistantForCausalLM": "it drafts for another model, whose states it reads",
    "GotOcr2ForConditionalGeneration": "Qwen2ForCausalLM is its language model",
    "MossTranscribeDiarizeForConditionalGeneration": "Qwen3ForCausalLM is its language model",
    "Phi4MultimodalForCausalLM": "its vision and speech towers cannot be left out; Phi3ForCausalLM is its language model",
    "MusicgenForCausalLM": "its tokens are those of several codebooks at once",
    "MusicgenMelodyForCausalLM": "its tokens are those of several codebooks at once",
    "MoshiForCausalLM": "it has the forward call of a part of a speech model",
    "ProphetNetForCausalLM": "its head reads several predictions of each position at once",
    "WhisperForCausalLM": "its generate is that of speech, which wants tokens of time",
    "XLMWithLMHeadModel": "transformers' generate appends a token of its own, and what it keeps between calls is NaN",
    "XLNetLMHeadModel": "transformers' generate appends a token of its own, at which the state is read",
    "ReformerModelWithLMHead": "its length must be a multiple of its chunks",
}
# They make something of padding, whatever the mask says: rows of one length are tested.
UNPADDED = {
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM", "MBartForCausalLM", "MarianForCausalLM"),
    *("MvpForCausalLM", "PLBartForCausalLM", "PegasusForCausalLM", "TrOCRForCausalLM", "GitForCausalLM"),
    "xLSTMForCausalLM",
}
UNBATCHED = {"RwkvForCausalLM": "transformers mixes the recurrent states of its rows"}
# The cache of some has more in it than tokens: a prompt of the model's own.
CACHES_MORE = {"CpmAntForCausalLM"}


def class_names() -> list[str]:
    """The causal language models of the installed transformers, each class once."""
    return sorted({name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)})


def small_config(name: str, **changes: Any) -> Any:
    """The config of a class, shrunk."""
    kind = getattr(transformers, name).config_class
    fields = {each.name for each in dataclasses.fields(kind)}
    aliases = {alias: field for alias, field in kind.attribute_map.items() if alias in SMALL and field not in SMALL}
    chosen = {field: size for field, size in SMALL.items() if field in fields or field in aliases}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        # Latent attention has keys and values for every head.
        chosen["num_key_value_heads"] = SMALL["num_attention_heads"]
    if "is_decoder" in fields:
        chosen["is_decoder"] = True
    return kind(**{**chosen, **OVERRIDES.get(name, {}), **changes})


def small_model(name: str) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return getattr(transformers, name)(small_config(name)).eval()
