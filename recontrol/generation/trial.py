"""Whether transformers' continuous batching can run a model: tried on a few tokens, once for each kind of model."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import configuration_utils

from recontrol.ambient import carried, product_dtype
from recontrol.decoding.batches import evaluation_mode, seeded
from recontrol.decoding.hooks import attachments, embedding_owner, output_embedding
from recontrol.decoding.model_config import vocabulary_size

# Two prompts of different lengths, so that rows must be kept apart, and enough new tokens for steps that read the cache.
PROMPT_LENGTHS, NEW_TOKENS = (5, 3), 3
_PATIENCE = 0.2
# Continuous batching has a logger of its own.
LOGGERS = ("transformers", "ContinuousBatchingLogger")
LONGEST_REASON = 200
_tried: dict[Any, str | None] = {}


def why_not(model: Any) -> str | None:
    """Why transformers' continuous batching cannot run this model; None where it reads the states that a plain call reads."""
    owner = embedding_owner(model, output_embedding(model))
    attention, autocast = getattr(model.config, "_attn_implementation", None), product_dtype(model.dtype, model.device)
    key = (type(owner), repr(model.config), attention, model.dtype, model.device, autocast)
    if key not in _tried:
        _tried[key] = _try(model, owner)
    return _tried[key]


def _try(model: Any, owner: Any) -> str | None:
    embedding, kind = output_embedding(model), type(owner).__name__
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(0))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_silent())
        for other in attachments(embedding):
            stack.enter_context(other.pause())
        seen: list[Tensor] = []
        hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone()))
        stack.callback(hook.remove)
        try:
            responses = _respond(model, _prompts(model))
            read = torch.cat(seen)
            seen.clear()
            wanted = torch.cat([_states(owner, seen, prompt, new) for prompt, new in responses])
        # Whatever it is, padded batches are there.
        except Exception as error:
            first_line = str(error).partition("\n")[0][:LONGEST_REASON]
            return f"transformers' continuous batching fails with {kind}: {first_line}"
    # How far each state that the model should have read is from the nearest that it has read.
    distance = (torch.cdist(wanted.double(), read.double()).amin(1) / wanted.double().norm(dim=1)).max().item()
    # Half of the digits: rounding takes fewer, and a wrong position or mask takes more.
    if not distance <= torch.finfo(product_dtype(wanted.dtype, wanted.device)).eps ** 0.5:
        return f"in transformers' continuous batches {kind} has other states than alone, by {distance:.1e} of their norm"
    return None


def _prompts(model: Any) -> list[list[int]]:
    known = vocabulary_size(model.config) or 2
    return [[(3 + 7 * place + length) % known for place in range(length)] for length in PROMPT_LENGTHS]


def _respond(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Each prompt with its new tokens, from a manager of the smallest size."""
    implementation = model.config._attn_implementation
    end = {"eos_token_id": -1, "max_new_tokens": NEW_TOKENS}
    found: dict[int, list[int]] = {}
    with contextlib.ExitStack() as stack:
        # Making a manager exchanges the attention. Some releases leave it so, and others when they fail; a plain call of the model fails then.
        stack.callback(_restore_attention, model, implementation)
        config = GenerationConfig(do_sample=False, pad_token_id=0, **end)
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=_smallest(model))
        stack.callback(manager.stop, block=True)
        manager._run_generation_loop = carried(manager._run_generation_loop)
        manager.start()
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(index), **end)
        while len(found) < len(prompts):
            result = manager.get_result(timeout=_PATIENCE)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("it ended early")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                found[int(result.request_id)] = list(result.generated_tokens)
    return [(prompt, found[index]) for index, prompt in enumerate(prompts)]


def _restore_attention(model: Any, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _smallest(model: Any) -> Any:
    """Settings of continuous batching, in the words of the installed release."""
    kind = configuration_utils.ContinuousBatchingConfig
    known = {each.name for each in dataclasses.fields(kind)}
    on_gpu = model.device.type == "cuda"
    wanted = {
        "page_size" if "page_size" in known else "block_size": 256 if on_gpu else 16,
        "num_blocks": 16,
        "max_batch_tokens": 256,
        "max_requests_per_batch": len(PROMPT_LENGTHS),
        # On the CPU it would look for kernels that are for GPUs.
        "auto_switch_to_flash": on_gpu,
        # A graph that is replayed runs no hook.
        "use_cuda_graph": False,
        "use_async_batching": False,
    }
    return kind(**{name: given for name, given in wanted.items() if name in known})


def _states(model: Any, seen: list[Tensor], prompt: list[int], new: list[int]) -> Tensor:
    """(new tokens, hidden_size): the states that a plain call reads to sample each new token."""
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt + new[:-1]], device=model.device), use_cache=False)
    return seen.pop()[-len(new) :]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No messages of transformers inside: the caller says what the trial found."""
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield
