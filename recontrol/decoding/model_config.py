"""What the config of a language model says of it, asked in one place: each family of transformers has names of its own."""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length", "max_target_positions")
# Neither a table nor a rotation for positions, or a recurrence: the length in the config, if there is one, is that of the training data.
UNLIMITED = ("bloom", "rwkv", "xlnet")
# They count positions from padding + 1 (ProphetNet leaves out one more), so that a table of n rows has room for fewer tokens.
COUNT_FROM_PADDING = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"), 1),
    "prophetnet": 2,
}
# Scaled positions whose `max_position_embeddings` may be the length before scaling; with the others it is the length after it.
SCALED_AFTER = ("linear", "dynamic", "yarn")
# The width of the last state, where it is projected before the output embedding reads it.
PROJECTED = {"electra": "embedding_size", "opt": "word_embed_proj_dim", "rembert": "output_embedding_size", "roformer": "embedding_size"}
# Key/value heads of a layer with a sliding window for each one of the others.
SLIDING_HEADS = {"mimo_v2_flash": 2}


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its language model."""
    return config.get_text_config(decoder=True)


def vocabulary_size(config: Any) -> int | None:
    """How many tokens the model knows; None where the config does not say."""
    return getattr(text_config(config), "vocab_size", None)


def state_width(config: Any) -> int:
    """The size of the states that the output embedding reads."""
    text = text_config(config)
    return getattr(text, PROJECTED.get(text.model_type, "hidden_size"))


def padding_token(config: Any) -> int | None:
    """The padding token, of the language model or else of the whole; None where there is none."""
    found = getattr(text_config(config), "pad_token_id", None)
    return getattr(config, "pad_token_id", None) if found is None else found


def set_padding_token(config: Any, token: int | None) -> None:
    """Write the padding token where models look for it: into the config and into that of the language model."""
    text_config(config).pad_token_id = token
    config.pad_token_id = token


def context_length(config: Any) -> int | None:
    """Tokens of one row, prompt and response, that the model is made for, with rotations the length after scaling; None where nothing limits them."""
    text = text_config(config)
    given = next((found for name in CONTEXT_NAMES if isinstance(found := getattr(text, name, None), int) and found > 0), None)
    # MPT adds a bias instead of positions too, but from a table.
    kind = getattr(text, "model_type", None)
    if given is None or kind in UNLIMITED or getattr(text, "alibi", False):
        return None
    if kind in COUNT_FROM_PADDING:
        return given - (getattr(text, "pad_token_id", None) or 0) - COUNT_FROM_PADDING[kind]
    # After the scaling of positions: max_position_embeddings, or factor times the length before scaling if that is more.
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    # Parameters by kind of layer are found where `max_position_embeddings` is the length after scaling.
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) not in SCALED_AFTER:
        return given
    factor, before = scaling.get("factor") or 1.0, scaling.get("original_max_position_embeddings") or given
    return max(given, int(factor * before))


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the key/value cache for one token of one row, sliding windows as if they had no end; a ValueError if the config does not tell."""
    numbers = sum(_numbers_per_token(kind, layer) for kind, layer in _layers(text_config(config)))
    if not numbers:
        raise ValueError(f"{_unknown(text_config(config))} no layer that keeps keys and values; use batch_size")
    return numbers * dtype.itemsize


def _layers(text: Any) -> Iterator[tuple[str, Any]]:
    """For each layer the kind of its cache, as transformers names it, and its config."""
    # Not at the top: whoever reads only --help would wait for it.
    from transformers import DynamicCache

    # Decoders of models that have an encoder too call the layers of the encoder `num_hidden_layers`.
    count = next((found for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers") if (found := getattr(text, name, None))), None)
    if not count:
        raise ValueError(f"{_unknown(text)} num_hidden_layers={count}; use batch_size")
    if count != getattr(text, "num_hidden_layers", None):
        return zip(["DynamicLayer"] * count, [text] * count, strict=True)
    made = getattr(DynamicCache(config=text), "layers", [])
    # A dummy belongs to a layer that reads the cache of another, or has no attention.
    kinds = [type(layer).__name__ if hasattr(layer, "keys") and "Dummy" not in type(layer).__name__ else "" for layer in made]
    configs = list(text.per_layer_config) if hasattr(type(text), "per_layer_config") else [text] * len(kinds)
    if getattr(text, "recurrent_kv_cache_mode", None) == "per_loop":
        # Dory: layers that run several times keep a cache for each time.
        repeated = slice(text.n_input_layers, text.n_input_layers + text.n_recurrent_layers)
        again = text.n_recurrent_loops - 1
        kinds, configs = kinds + kinds[repeated] * again, configs + configs[repeated] * again
    return zip(kinds, configs, strict=False)


def _numbers_per_token(kind: str, layer: Any) -> int:
    """Numbers in the cache of one layer for one token."""
    if not kind:
        return 0
    # The keys of the index by which a layer chooses what it attends to.
    index = (_first(layer, "index_head_dim", "indexer_head_dim") or 0) if "Indexed" in kind else 0
    latent = getattr(layer, "kv_lora_rank", None)
    if latent and _caches_latents():
        return latent + layer.qk_rope_head_dim + index
    sliding = "swa_" if "Sliding" in kind else ""
    heads, width = _first(layer, f"{sliding}num_attention_heads", "decoder_attention_heads", "num_attention_heads"), getattr(layer, "hidden_size", None)
    size = _first(layer, f"{sliding}head_dim", "head_dim") or (width // heads if heads and width else None)
    if not heads or not size:
        raise ValueError(f"{_unknown(layer)} num_attention_heads={heads}, hidden_size={width}, head_dim={size}; use batch_size")
    # One head for all queries, where the older Falcon and StarCoder say so by a flag of their own.
    shared = getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False)
    cached = 1 if shared else _first(layer, f"{sliding}num_key_value_heads", "num_key_value_heads", "num_kv_heads") or heads
    cached *= SLIDING_HEADS.get(layer.model_type, 1) if sliding else 1
    # Latent attention has keys and values of sizes of their own.
    return cached * ((getattr(layer, "qk_head_dim", None) or size) + (getattr(layer, "v_head_dim", None) or size)) + index


def _first(config: Any, *names: str) -> int | None:
    return next((found for name in names if (found := getattr(config, name, None))), None)


def _unknown(config: Any) -> str:
    return f"the size of the key/value cache cannot be told from {type(config).__name__}: found"


@functools.cache
def _caches_latents() -> bool:
    """Whether the installed transformers keeps the latents of latent attention, as newer releases do, and not keys and values made from them."""
    module = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    return hasattr(module.DeepseekV3Attention, "expand_kv")
