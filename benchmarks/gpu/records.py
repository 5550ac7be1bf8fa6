"""What comes of a case: timings, the columns of their rows, and what went wrong, without losing the rest."""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, gpu_environment
from benchmarks.race import Timing
from benchmarks.rows import Row, append_rows, percentiles


@dataclass
class Outcome:
    """What came of one case.

    Attributes:
        timings: by variant.
        columns: by variant, the columns of its row alone.
        shared: the columns that its rows share.
        failures: by variant, what it raised; it has no row then.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def attempt(self, variant: str) -> Iterator[None]:
        """Keep what goes wrong with one variant from the others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures[variant] = f"{type(error).__name__}: {error}"


def record(path: Path, case: str, outcome: Outcome, device: torch.device) -> list[Row]:
    """Add the rows of a case to a file, and return them."""
    where = environment() | (gpu_environment() if device.type == "cuda" else {})
    rows = [
        Row(**where, case=case, variant=name, **outcome.shared, **outcome.columns.get(name, {}), **percentiles(timing.seconds))
        for name, timing in outcome.timings.items()
    ]
    append_rows(path, rows)
    return rows
