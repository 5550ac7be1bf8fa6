"""Collection and training against the released code's way, in time and memory, as the data grow."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline
from benchmarks.race import REPLAY, Timing

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("recontrol", "released_code")


@dataclass(frozen=True)
class Cell:
    """One case: so many prompts to collect from, or responses to train on."""

    kind: str
    size: int
    rounds: int = 3

    @property
    def name(self) -> str:
        """In words."""
        if self.kind == "collect":
            return f"movie_reviews, {self.size} prompts, {pipeline.NEW_TOKENS} new tokens, batch {pipeline.GENERATED_AT_ONCE}"
        return f"one epoch, {self.size} responses of 8 to {pipeline.LONGEST} tokens, H = {pipeline.HIDDEN_SIZE}, D = {pipeline.WIDTH}"


# 1, 4 and 16 times the data.
FULL = [Cell("collect", 64), Cell("collect", 256), Cell("collect", 1024, 2), Cell("train", 256), Cell("train", 1024), Cell("train", 4096, 2)]
SMOKE = [Cell("collect", 4, 1), Cell("train", 8, 1)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells = SMOKE if metafunc.config.getoption("smoke") else FULL
    pairs = [(cell, variant) for cell in cells for variant in VARIANTS]
    metafunc.parametrize(("cell", "variant"), pairs, ids=[f"{cell.kind}-{cell.size}-{variant}" for cell, variant in pairs])


@pytest.mark.benchmark(timer=REPLAY.time)
def bench_pipeline(benchmark: Any, races: Any, cell: Cell, variant: str) -> None:
    """The first variant of a case runs both in turn; each test then shows its own."""
    races.replay(benchmark, cell.name, variant, lambda: run(cell))


def run(cell: Cell) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Measure one case; every round is a process of its own.

    Raises:
        AssertionError: the two ways did not see the same number of tokens.
    """
    timings = {variant: Timing([]) for variant in VARIANTS}
    peaks, tokens = dict.fromkeys(VARIANTS, 0), set()
    with tempfile.TemporaryDirectory() as prepared:
        if cell.kind == "train":
            _python("prepare", prepared, cell.size)
        for _ in range(cell.rounds):
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as fresh:
                    found = json.loads(_python(cell.kind, variant, prepared if cell.kind == "train" else fresh, cell.size))
                timings[variant].seconds.append(found["seconds"])
                peaks[variant] = max(peaks[variant], found["peak_bytes"])
                tokens.add(found["tokens"])
    assert len(tokens) == 1, f"{cell.name}: found {sorted(tokens)} tokens"
    training = cell.kind == "train"
    shared = {
        "suite": cell.kind,
        "layers": 2 if training else 0,
        "weights": "",
        "batch": pipeline.TRAINED_AT_ONCE if training else pipeline.GENERATED_AT_ONCE,
        "hidden_size": pipeline.HIDDEN_SIZE if training else 256,
        "width": pipeline.WIDTH if training else 0,
        "step_size": 0.0,
        "steps": 0,
        "dtype": "float32",
        "detail": f"{cell.size} {'responses' if training else 'prompts'}",
        "tokens": tokens.pop(),
    }
    return timings, {variant: {**shared, "peak_bytes": peaks[variant]} for variant in VARIANTS}


def _python(*arguments: object) -> str:
    command = [sys.executable, "-m", "benchmarks.pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1] if done.stdout.strip() else ""
