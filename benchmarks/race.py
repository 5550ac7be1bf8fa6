"""Timing variants of one case in turn (A B C A B C ...), and handing the times to pytest-benchmark."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.environment import last_level_cache_bytes

# Runs something; returns its seconds and its result.
Measure = Callable[[Callable[[], object]], tuple[float, object]]


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    Args:
        name: for example "dense"; the same in every case.
        run: does the work once and returns its result.
        detail: which form of it, where there are several.
        least_rounds: how often it runs at least, however slow.
        repeats: how often one `run` does the work; the time of a round is that of one of them.
    """

    name: str
    run: Callable[[], object]
    detail: str = ""
    least_rounds: int = 1
    repeats: int = 1


@dataclass
class Timing:
    """What came of one variant.

    Args:
        seconds: of each round.
        result: of the last round.
    """

    seconds: list[float]
    result: Any = None


def race(variants: list[Variant], budget: float, most_rounds: int, measure: Measure | None = None) -> dict[str, Timing]:
    """Time the variants in turn, so that drift of the machine meets all of them alike.

    Args:
        variants: what to time; each must already have compiled and allocated what it keeps.
        budget: seconds per variant. One whose first round takes longer is not run again, unless it asks for more rounds;
            the first round of any other is not counted.
        most_rounds: upper limit of rounds per variant.
        measure: runs something and tells its seconds and its result; by default `cold_processor()`.

    Returns:
        by variant name; the rounds of a slow variant are spread evenly over those of the quick.
    """
    measure = measure or cold_processor()
    timings: dict[str, Timing] = {}
    rounds: dict[str, int] = {}
    gc.collect()
    gc.disable()
    try:
        for variant in variants:
            first = timings[variant.name] = Timing([])
            _run(variant, first, measure)
            rounds[variant.name] = max(1, min(most_rounds, max(variant.least_rounds, int(budget / (first.seconds[0] * variant.repeats)))))
            if rounds[variant.name] > 1:
                first.seconds.clear()
        turns = max(rounds.values(), default=0)
        for turn in range(turns):
            for variant in variants:
                share, timing = rounds[variant.name], timings[variant.name]
                due = (turn + 1) * share // turns > turn * share // turns
                if due and len(timing.seconds) < share:
                    _run(variant, timing, measure)
        return timings
    finally:
        gc.enable()


def cold_processor() -> Measure:
    """Wall-clock time on a processor whose caches are cold.

    Before each run a buffer of twice the last-level cache is read, untimed: in life a decode step of the language model
    streams its weights between two ascents, so no round may find its matrices in cache.
    """
    cold = torch.ones(max(1, 2 * last_level_cache_bytes() // 4))

    def measure(run: Callable[[], object]) -> tuple[float, object]:
        cold.sum()
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    return measure


def _run(variant: Variant, timing: Timing, measure: Measure) -> None:
    seconds, timing.result = measure(variant.run)
    timing.seconds.append(seconds / variant.repeats)


class ReplayClock:
    """A clock that shows recorded times again.

    pytest-benchmark times the rounds of one test after another and cannot interleave tests. So the rounds are timed by
    `race`, and each test replays those of its variant under this clock; table, JSON and comparison then work as usual.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def time(self) -> float:
        """Seconds replayed so far; the `timer` of the benchmark marker."""
        return self._now

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Run as many rounds as were recorded, each as long as it was."""
        pending = iter(seconds)

        def one_round() -> None:
            self._now += next(pending)

        benchmark.pedantic(one_round, rounds=len(seconds))


REPLAY = ReplayClock()
