"""How much key/value cache a generation takes, how many prompts fit into a budget at once, and the plan that follows."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrol.checks import first_few, integer, required
from recontrol.decoding.model_config import cache_bytes_per_token
from recontrol.decoding.packing import byte_count, pack_by_length

# Tokens of a block: what attention kernels on a GPU want, and elsewhere little, so that little is wasted.
GPU_BLOCK_TOKENS, BLOCK_TOKENS = 256, 16
# Tokens that go through the model at once. Without paged kernels attention takes this times the whole cache.
GPU_BATCH_TOKENS, BATCH_TOKENS = 2048, 256
# Requests decoded at once where attention reads the cache of all others too.
REQUESTS_AT_ONCE = 32
# Of the memory that is free, where no budget is given.
FREE_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """How prompts, whose `lengths` are their tokens when the response is finished, are batched under a budget of bytes for the key/value cache."""

    bytes_per_token: int
    budget: int
    lengths: tuple[int, ...]
    block_tokens: int
    blocks: int
    batch_tokens: int
    batch_size: int

    @property
    def blocks_needed(self) -> list[int]:
        """Blocks that each prompt takes when its response is finished."""
        return [math.ceil(length / self.block_tokens) for length in self.lengths]

    def static_batches(self) -> list[list[int]]:
        """The prompts of each padded batch, the longest first; prompts that do not fit even alone are refused by name."""
        return pack_by_length(self.lengths, self.budget, self.bytes_per_token, largest=self.batch_size)

    def checked(self) -> "Plan":
        """This plan; prompts that do not fit into the paged cache even alone are refused by name."""
        alone = [f"{index} ({self.lengths[index]} tokens)" for index, needed in enumerate(self.blocks_needed) if needed > self.blocks]
        if alone:
            room = f"{self.blocks} blocks of {self.block_tokens} tokens"
            raise ValueError(f"{len(alone)} prompts do not fit into {room} even alone: {first_few(alone)}; give a larger cache_budget")
        return self

    def __str__(self) -> str:
        """The plan in words, a line for each number."""
        need, block_bytes, batches = sum(self.blocks_needed), self.block_tokens * self.bytes_per_token, self.static_batches()
        # All of them finished to the last token.
        longest = min(self.batch_size, self.blocks // max(self.blocks_needed))
        average = min(self.batch_size, len(self.lengths), int(self.blocks / (need / len(self.lengths))))
        padded = sum(len(batch) * max(self.lengths[index] for index in batch) for batch in batches)
        padding = f"{1 - sum(self.lengths) / padded:.0%} of their cache is padding"
        lines = [
            ("cache of a token", f"{self.bytes_per_token} bytes over all layers"),
            ("budget", f"{self.budget} bytes, {self.budget // self.bytes_per_token} tokens"),
            ("prompts", f"{len(self.lengths)}, the longest {max(self.lengths)} tokens with its response, all {sum(self.lengths)} tokens"),
            ("blocks", f"{self.blocks} of {self.block_tokens} tokens ({block_bytes} bytes each); all prompts at once need {need}"),
            ("at once", f"{longest} as long as the longest, {average} of average length, {self.batch_size} at most"),
            ("tokens a step", f"{self.batch_tokens} at most"),
            ("static batches", f"{len(batches)}, the largest of {max(map(len, batches))} prompts; {padding}"),
        ]
        return "\n".join(f"{name + ':':<18}{text}" for name, text in lines)


def make_plan(
    config: Any,
    dtype: torch.dtype,
    lengths: Sequence[int],
    *,
    device: str | torch.device = "cpu",
    cache_budget: int | str | None = None,
    batch_size: int | None = None,
    block_tokens: int | None = None,
) -> Plan:
    """Plan a generation: blocks = min(budget // (block_tokens * bytes_per_token), what the prompts need); settings as for `recontrol.generate`."""
    on_gpu = torch.device(device).type == "cuda"
    if not lengths:
        raise ValueError("there are no prompts to plan for")
    # Attention kernels on a GPU take blocks of this size; others have a smallest size of 4.
    block_tokens = (GPU_BLOCK_TOKENS if on_gpu else BLOCK_TOKENS) if block_tokens is None else block_tokens
    for name, given, least in (("batch_size", batch_size, 1), ("block_tokens", block_tokens, 4)):
        if given is not None:
            integer(name, given, least)
    per_token = cache_bytes_per_token(config, dtype)
    budget = int(FREE_SHARE * free_bytes(device)) if cache_budget is None else byte_count(cache_budget)
    affordable = budget // (block_tokens * per_token)
    if not affordable:
        raise ValueError(f"a cache budget of {budget} bytes is less than one block of {block_tokens} tokens, {block_tokens * per_token} bytes")
    at_once = min(len(lengths), batch_size or (len(lengths) if on_gpu else REQUESTS_AT_ONCE))
    batch_tokens = max(GPU_BATCH_TOKENS if on_gpu else BATCH_TOKENS, 2 * at_once)
    plan = Plan(per_token, budget, tuple(lengths), block_tokens, affordable, batch_tokens, at_once)
    return dataclasses.replace(plan, blocks=min(affordable, sum(sorted(plan.blocks_needed)[-at_once:])))


def tells_its_cache(config: Any) -> bool:
    """Whether a model's config has the sizes of its key/value cache; one of recurrent layers only has none."""
    try:
        cache_bytes_per_token(config, torch.float32)
    except ValueError:
        return False
    return True


def free_bytes(device: str | torch.device) -> int:
    """Memory that is free on a device now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Linux has it.
    if (memory := Path("/proc/meminfo")).exists():
        return 1024 * int(memory.read_text().split("MemAvailable:")[1].split()[0])
    return required("psutil", "train").virtual_memory().available
