"""Continuous batches: prompts join the batch when there are free blocks of paged cache, and leave it when they are finished."""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import configuration_utils

from recontrol.ambient import carried
from recontrol.decoding.hooks import embedding_owner, output_embedding
from recontrol.decoding.model_config import text_config
from recontrol.generation.plan import Plan
from recontrol.generation.request_editing import RequestEditing, Rows
from recontrol.generation.requests import BatchDecoding, Tokens

# What transformers' continuous batching does with a generation config beside end-of-sequence tokens; it would pass over the rest.
UNDERSTOOD = {"do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id", "bos_token_id", "generation_config"}
# Releases of transformers: the first that is known to work, and the first that agrees with `generate` for sliding windows.
KNOWN_FROM, SLIDING_FROM = (5, 8), (5, 17)
# How long to wait for a response before looking whether the thread that decodes is still alive, in seconds.
_PATIENCE = 0.2


def why_not(model: Any, decoding: BatchDecoding) -> str | None:
    """Why this cannot be generated in continuous batches; None where it can."""
    if release() < KNOWN_FROM or not callable(getattr(model, "init_continuous_batching", None)):
        return f"transformers {transformers.__version__} has no continuous batching of the kind that is known here (there is from {_dotted(KNOWN_FROM)} on)"
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        return "the model keeps a manager of continuous batches; call its destroy_cached_continuous_batching_manager() first"
    others = sorted(name for name, given in decoding.options.items() if given is not None and name not in UNDERSTOOD)
    if others:
        return f"transformers' continuous batching takes no {', '.join(others)}"
    wanted = _generation_config(model, decoding)
    with warnings.catch_warnings():
        # Some processors want to see the prompts, which are not there yet.
        warnings.simplefilter("ignore")
        processors = model._get_logits_processor(wanted)
    unsupported = [type(each).__name__ for each in processors if not getattr(each, "supports_continuous_batching", False)]
    unsupported += sorted(name for name in ("max_time", "min_length", "min_new_tokens", "stop_strings") if getattr(wanted, name, None))
    if unsupported:
        return f"the model's generation config asks for {', '.join(unsupported)}, which transformers' continuous batching would pass over"
    owner = embedding_owner(model, output_embedding(model))
    if not getattr(owner, "_supports_attention_backend", False) or getattr(owner, "_is_stateful", False):
        return f"the attention of {type(owner).__name__} cannot be exchanged for a paged one"
    text = text_config(model.config)
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"its layers are not all attention: {', '.join(sorted(kinds))}"
    if release() < SLIDING_FROM and ("sliding_attention" in kinds or (not kinds and getattr(text, "sliding_window", None) is not None)):
        return f"transformers {transformers.__version__} gets sliding windows wrong in continuous batches (they are right from {_dotted(SLIDING_FROM)} on)"
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager", "paged|eager") and "flash" not in str(implementation):
        return f"attention of kind {implementation!r} is not paged"
    return None


def tokens(model: Any, prompts: Sequence[list[int]], plan: Plan, editing: RequestEditing | None, decoding: BatchDecoding) -> Tokens:
    """Generate with transformers' continuous batching; a RuntimeError has its reason. Tokens come at once if `decoding.streaming`, else with the last."""
    watched = decoding.streaming or decoding.ends is not None
    counts = dict.fromkeys(range(len(prompts)), 0)
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_attention, model, model.config._attn_implementation)
        config = _batching_config(model, plan, decoding, hooked=editing is None or editing.steers)
        manager = model.init_continuous_batching(generation_config=_generation_config(model, decoding), continuous_batching_config=config)
        stack.callback(manager.stop, block=True)
        if editing is not None and editing.steers:
            editing.source = functools.partial(_rows, manager)
        manager._run_generation_loop = carried(manager._run_generation_loop)
        manager.start()
        # What is under way when the caller stops early.
        stack.callback(lambda: [manager.cancel_request(str(index)) for index in counts])
        eos = sorted(decoding.eos_ids) or -1
        for index, ids in enumerate(prompts):
            manager.add_request(ids, request_id=str(index), max_new_tokens=decoding.max_new_tokens, streaming=watched, eos_token_id=eos)
        while counts:
            result = manager.get_result(timeout=_PATIENCE)
            if result is None and not manager.is_running():
                raise RuntimeError(f"continuous batching ended before {len(counts)} responses were finished")
            # What is not counted was cut at a stop string before; this one was on its way.
            if result is None or (index := int(result.request_id)) not in counts:
                continue
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed at prompt {index}: {result.error}")
            new, stopped = result.generated_tokens, False
            while not stopped and counts[index] < len(new):
                yield index, new[counts[index]]
                counts[index] += 1
                stopped = decoding.ends is not None and decoding.ends(new[: counts[index]])
            if stopped or result.is_finished():
                del counts[index]
                if not result.is_finished():
                    manager.cancel_request(str(index))
                yield index, None


def _restore_attention(model: Any, implementation: str) -> None:
    # Making a manager exchanges the attention. Some releases leave it so, and others when they fail; a plain call of the model fails then.
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _rows(manager: Any, given: dict[str, Any]) -> Rows | None:
    """The rows of a forward call of transformers' manager, which lists the requests that get a token in the order of their states; None for other calls."""
    processor = manager.batch_processor
    if processor is None or given.get("cache") is not processor.cache:
        return None
    positions = processor.inputs_and_outputs.req_id_to_new_token_position
    # The model may be told which states to keep; otherwise all tokens of the batch go through the output embedding.
    kept = isinstance(given.get("logits_to_keep"), torch.Tensor)
    return Rows([int(name) for name in positions], list(range(len(positions)) if kept else positions.values()), last=False)


def release() -> tuple[int, int]:
    """The installed release of transformers, without its last number."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _dotted(found: tuple[int, int]) -> str:
    return ".".join(map(str, found))


def _generation_config(model: Any, decoding: BatchDecoding) -> GenerationConfig:
    """A generation config of its own, since transformers writes into the one it is given."""
    config = copy.deepcopy(decoding.options.get("generation_config") or model.generation_config)
    config.update(**{name: given for name, given in decoding.options.items() if name != "generation_config"})
    config.update(max_new_tokens=decoding.max_new_tokens, eos_token_id=sorted(decoding.eos_ids) or -1, pad_token_id=decoding.pad_id)
    return config


def _batching_config(model: Any, plan: Plan, decoding: BatchDecoding, *, hooked: bool) -> Any:
    """The settings, in the words of the installed release."""
    # By name, since older releases have none.
    config_class = configuration_utils.ContinuousBatchingConfig
    known = {each.name for each in dataclasses.fields(config_class)}
    wanted: dict[str, Any] = {
        # It was renamed.
        "page_size" if "page_size" in known else "block_size": plan.block_tokens,
        "num_blocks": plan.blocks,
        "max_batch_tokens": plan.batch_tokens,
        "max_requests_per_batch": plan.batch_size,
        "seed": decoding.seed,
        # On the CPU it would look for kernels that are for GPUs.
        "auto_switch_to_flash": model.device.type != "cpu",
    }
    if hooked:
        # A graph that is replayed runs no hook, and of two batches under way it could not be told whose rows these are.
        wanted |= {"use_cuda_graph": False, "use_async_batching": False}
    return config_class(**{name: given for name, given in wanted.items() if name in known})
