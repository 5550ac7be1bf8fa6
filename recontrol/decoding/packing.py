"""Batches of rows of similar length that fit into a memory budget for the key/value cache."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recontrol.checks import first_few
from recontrol.decoding.model_config import cache_bytes_per_token

BATCH_SIZE = 16
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Packing:
    """How entries are batched: at most `batch_size` (None: 16, or no limit with a budget), and by length under a budget of bytes for the key/value cache."""

    batch_size: int | None = None
    cache_budget: int | str | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ValueError(f"batch_size must be an integer of at least 1, found {self.batch_size!r}")
        if self.cache_budget is not None:
            object.__setattr__(self, "cache_budget", byte_count(self.cache_budget))
        elif self.batch_size is None:
            object.__setattr__(self, "batch_size", BATCH_SIZE)

    def batches(self, model: Any, entries: Sequence[int], lengths: Callable[[], Sequence[int]], rows_per_entry: int = 1) -> list[list[int]]:
        """Cut a list of entries into batches; `lengths`, asked for with a budget only, gives the tokens of each entry when it is finished."""
        if not isinstance(self.cache_budget, int):
            size = self.batch_size or BATCH_SIZE
            return [list(entries[start : start + size]) for start in range(0, len(entries), size)]
        per_token = cache_bytes_per_token(model.config, model.dtype)
        packed = pack_by_length(lengths(), self.cache_budget, per_token, rows_per_entry=rows_per_entry, largest=self.batch_size, names=entries)
        return [[entries[place] for place in batch] for batch in packed]


def byte_count(size: int | str) -> int:
    """Bytes from a number of them or a text such as "8GiB" or "500MB"."""
    found = re.fullmatch(r"(\d+\.?\d*) *([KMGT]?)(i?)B", size.strip(), re.IGNORECASE) if isinstance(size, str) else None
    if found is None and not isinstance(size, int):
        raise ValueError(f'a size is a number of bytes or a text such as "8GiB" or "500MB", found {size!r}')
    count = int(size) if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])
    if count < 1:
        raise ValueError(f"a size must be above 0 bytes, found {size!r}")
    return count


def pack_by_length(
    lengths: Sequence[int], budget: int, bytes_per_token: int, *, rows_per_entry: int = 1, largest: int | None = None, names: Sequence[int] | None = None
) -> list[list[int]]:
    """Batches, as places in `lengths`, the longest first: rows_per_entry * entries * longest length * bytes_per_token <= budget, at most `largest` entries."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    fitting = [budget // (rows_per_entry * lengths[place] * bytes_per_token) for place in order]
    alone = fitting.count(0)
    if alone:
        called, longest = first_few([place if names is None else names[place] for place in order[:alone]]), lengths[order[0]]
        needed = f"{rows_per_entry} rows * {longest} tokens * {bytes_per_token} bytes = {rows_per_entry * longest * bytes_per_token} bytes"
        raise ValueError(f"the key/value cache of {alone} entries does not fit into {budget} bytes: {called}; the longest needs {needed}")
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        batches.append(sorted(order[start : start + min(fitting[start], largest or len(order))]))
        start += len(batches[-1])
    return batches
