"""Decoding of fixed batches at the lowest latency: one static cache, and a decode step that is one CUDA graph, control included."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from recontrol.ambient import product_dtype
from recontrol.ascent.backends import capturable
from recontrol.decoding.batches import check_options, check_tokens, effective
from recontrol.decoding.controller import Handle
from recontrol.decoding.hooks import CACHE_NAMES, attachments, embedding_owner, input_device, output_embedding
from recontrol.decoding.model_config import context_length, text_config

# Modes of the compiler that record CUDA graphs.
GRAPH_MODES = ("reduce-overhead", "max-autotune")
REFUSED = {
    **dict.fromkeys((*CACHE_NAMES, "cache_implementation", "use_cache"), "the decoder has a cache of its own"),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"), "the step is for one token a row"),
    "inputs_embeds": "prompts are tokens here",
    "max_length": "use max_new_tokens",
    "compile_config": "it is an argument of StaticDecoder",
}


class StaticDecoder:
    """Prepares a language model for the lowest latency per token, with or without a `Controller` attached.

    The key/value cache is allocated once, for `batch_size` rows of `max_tokens` positions; the decode step is compiled whole and recorded as one CUDA graph.
    The first call of `generate` compiles, which takes long for a large model, as do attaching and detaching a controller, and the first padding. One thread
    at a time. Graph and cache stay in memory until the decoder is gone and `torch.compiler.reset()` was called.

    Args:
        model: a causal language model of transformers on its device; on the CPU nothing is compiled unless `compile_config` asks for it.
        batch_size: rows, over all sequences of a prompt.
        max_tokens: prompt and new tokens of the longest row.
        compile_config: how the step is compiled; by default whole (`fullgraph`), for fixed shapes, with CUDA graphs.
    """

    def __init__(self, model: Any, batch_size: int = 1, max_tokens: int = 1024, compile_config: CompileConfig | None = None):
        for name, given in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ValueError(f"{name} must be a positive integer, found {given!r}")
        owner = embedding_owner(model, output_embedding(model))
        self._cache_name = cache_name(owner)
        context = context_length(owner.config)
        if context is not None and max_tokens > context:
            raise ValueError(f"max_tokens is {max_tokens}, the context of this model {context}")
        self.model, self.batch_size, self.max_tokens, self._owner = model, batch_size, max_tokens, owner
        self._on_cpu = input_device(model).type == "cpu"
        self._config = text_config(owner.config)
        self._make_cache()
        chosen: Any = copy.copy(compile_config)
        if not self._on_cpu:
            chosen = chosen or CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
        elif chosen is not None:
            # Without this, transformers does not compile there.
            chosen._compile_all_devices = True
        self.compile_config = chosen

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, **options: Any) -> Any:
        """Respond to prompts as `model.generate` does, which says what is returned and which other `options` there are.

        `input_ids` and `attention_mask` are (prompts, tokens), padded on the left; with `num_return_sequences` they make `batch_size` rows. What does not fit
        the cache is a ValueError, a backend that cannot be part of a CUDA graph a RuntimeError.
        """
        check_options(options, REFUSED)
        if (effective(self.model, options, "num_beams") or 1) != 1:
            raise ValueError("beams move rows of the cache about, which a static decoder does not: leave num_beams at 1")
        rows = input_ids.shape[0] * (effective(self.model, options, "num_return_sequences") or 1)
        if rows != self.batch_size:
            raise ValueError(f"this decoder is for {self.batch_size} rows, found {rows}")
        length = input_ids.shape[1] + max_new_tokens
        if length > self.max_tokens:
            parts = f"{input_ids.shape[1]} tokens of the prompts and {max_new_tokens} new ones"
            raise ValueError(f"{parts} make {length}, this decoder is for {self.max_tokens}: give a larger max_tokens")
        check_tokens(self.model, input_ids.tolist())
        handles = [each for each in attachments(self._owner) if isinstance(each, Handle) and each.expects_edits()]
        if self.compile_config is not None and self.compile_config.mode in GRAPH_MODES and not self._on_cpu:
            for handle in handles:
                if (backend := handle.backend(self.batch_size)) not in capturable():
                    choices = f"{', '.join(map(repr, capturable()))}, or do without graphs: StaticDecoder(..., compile_config=CompileConfig(mode='default'))"
                    raise RuntimeError(f"backend {backend!r} of the controller waits for the device at every step; choose one of {choices}")
        options["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.compile_config is not None:
            options["compile_config"] = self.compile_config
        # The cache is allocated by the first call and written by all others, whatever mode they are in.
        before = [handle._batch.counts() for handle in handles]
        with torch.inference_mode(False):
            if self._cached_dtype != product_dtype(self.model.dtype, self.model.device):
                self._make_cache()
            self.cache.reset()
            output = self.model.generate(input_ids, max_new_tokens=max_new_tokens, **{self._cache_name: self.cache}, **options)
        # Compiled code and graphs count on the device.
        if any(handle._batch.counts() == seen for handle, seen in zip(handles, before, strict=True)):
            raise RuntimeError("a controller is attached and no state was edited: compiled code goes round it; make a new StaticDecoder")
        return output

    @torch.inference_mode(False)
    def _make_cache(self) -> None:
        # Under autocast keys and values are of another dtype, and the step is compiled again anyway.
        self._cached_dtype = product_dtype(self.model.dtype, self.model.device)
        self.cache = StaticCache(config=self._config, max_cache_len=self.max_tokens)


def cache_name(model: Any) -> str:
    """The name of a model's key/value cache; a TypeError if it has none that a static one can replace."""
    parameters = inspect.signature(type(model).forward).parameters
    found = next((name for name in CACHE_NAMES if name in parameters and name != "cache_params"), None)
    if found is None:
        raise TypeError(f"{type(model).__name__} keeps no key/value cache that a static one can replace")
    return found
