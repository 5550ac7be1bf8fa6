"""Whether transformers' continuous batching can run a model: tried on a few tokens, once for each kind of model."""

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from recontrol.decoding.batches import evaluation_mode, seeded
from recontrol.decoding.hooks import attachments, embedding_owner, output_embedding
from recontrol.decoding.model_config import vocabulary_size
from recontrol.generation import continuous
from recontrol.generation.plan import Plan
from recontrol.generation.requests import BatchDecoding

# Two prompts of different lengths, so that rows must be kept apart, and enough new tokens for steps that read the cache.
PROMPT_LENGTHS, NEW_TOKENS = (5, 3), 3
LONGEST_REASON = 200
_tried: dict[Any, str | None] = {}


def why_not(model: Any) -> str | None:
    """Why transformers' continuous batching cannot run this model; None where it reads the states that a plain call reads."""
    owner = embedding_owner(model, output_embedding(model))
    key = (type(owner), repr(model.config), getattr(model.config, "_attn_implementation", None), model.dtype, model.device)
    if key not in _tried:
        _tried[key] = _try(model, owner)
    return _tried[key]


def _try(model: Any, owner: Any) -> str | None:
    embedding, kind, known = output_embedding(model), type(owner).__name__, vocabulary_size(model.config) or 2
    prompts = [[(3 + 7 * place + length) % known for place in range(length)] for length in PROMPT_LENGTHS]
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(0))
        stack.enter_context(evaluation_mode(model))
        # The caller says what the trial found. Continuous batching has a logger of its own.
        for logger in map(logging.getLogger, ("transformers", "ContinuousBatchingLogger")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        for other in attachments(embedding):
            stack.enter_context(other.pause())
        seen: list[Tensor] = []
        hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone()))
        stack.callback(hook.remove)
        try:
            responses = _respond(model, prompts)
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
    if not distance <= torch.finfo(wanted.dtype).eps ** 0.5:
        return f"in transformers' continuous batches {kind} has other states than alone, by {distance:.1e} of their norm"
    return None


def _respond(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Each prompt with its new tokens, from a manager of the smallest size."""
    plan = Plan(0, 0, (), block_tokens=256 if model.device.type == "cuda" else 16, blocks=16, batch_tokens=256, batch_size=len(prompts))
    decoding = BatchDecoding(max_new_tokens=NEW_TOKENS, options={"generation_config": GenerationConfig(do_sample=False)})
    new: list[list[int]] = [[] for _ in prompts]
    for index, token in continuous.tokens(model, prompts, plan, None, decoding):
        if token is not None:
            new[index].append(token)
    return list(zip(prompts, new, strict=True))


def _states(model: Any, seen: list[Tensor], prompt: list[int], new: list[int]) -> Tensor:
    """(new tokens, hidden_size): the states that a plain call reads to sample each new token."""
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt + new[:-1]], device=model.device), use_cache=False)
    return seen.pop()[-len(new) :]
