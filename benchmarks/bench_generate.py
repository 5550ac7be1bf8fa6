"""`recontrol.generate` on prompts of mixed lengths: continuous batches, padded ones, and the released code's way, with control and without."""

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.generation import LONGEST, NEW_TOKENS, SHORTEST, STEP_SIZE, STEPS, WAYS, WIDTH, Work, Worker
from benchmarks.race import REPLAY, Timing, Variant, race


@dataclass(frozen=True)
class Cell:
    """One case: so many prompts, and so much key/value cache."""

    prompts: int
    budget: str

    @property
    def name(self) -> str:
        """In words."""
        lengths = f"{self.prompts} prompts of {SHORTEST} to {LONGEST} tokens, up to {NEW_TOKENS} new ones"
        return f"movie_reviews, {lengths}, cache of {self.budget}, value function {WIDTH} wide, alpha {STEP_SIZE}, n {STEPS}"

    @property
    def id(self) -> str:
        """For pytest's -k, for example "generate-32-16MiB"."""
        return f"generate-{self.prompts}-{self.budget}"


FULL = [Cell(32, "16MiB")]
SMOKE = [Cell(3, "16MiB")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells = SMOKE if metafunc.config.getoption("smoke") else FULL
    pairs = [(cell, variant) for cell in cells for variant in WAYS]
    metafunc.parametrize(("cell", "variant"), pairs, ids=[f"{cell.id}-{variant}" for cell, variant in pairs])


@pytest.mark.benchmark(timer=REPLAY.time)
def bench_generate(benchmark: Any, races: Any, smoke: bool, cell: Cell, variant: str) -> None:
    """The first variant of a case runs them all in turn; each test then shows its own."""
    races.replay(benchmark, cell.name, variant, lambda: run(cell, budget=0.05 if smoke else 8.0, most_rounds=1 if smoke else 5))


def run(cell: Cell, budget: float, most_rounds: int) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Measure one case; each variant has a process of its own, which waits while the others generate.

    Raises:
        AssertionError: a response is not that of `model.generate` to the prompt alone.
    """
    with contextlib.ExitStack() as stack:
        workers = {variant: stack.enter_context(Worker(variant, cell.prompts, cell.budget)) for variant in WAYS}
        for worker in workers.values():
            worker.wait()
        # The loop takes as long as all others together.
        variants = [Variant(name, worker.generate, least_rounds=1 if name == "released_loop" else 3) for name, worker in workers.items()]
        timings = race(variants, budget, most_rounds)
    work = Work(cell.prompts, cell.budget)
    wanted = {controlled: work.alone(controlled) for controlled in (True, False)}
    use = {batching: work.cache_use(batching, wanted[False]) for batching, _ in WAYS.values()}
    shared = {
        "suite": "generate",
        "layers": 2,
        "weights": "initialised",
        "batch": cell.prompts,
        "hidden_size": work.value.hidden_size,
        "width": WIDTH,
        "step_size": STEP_SIZE,
        "steps": STEPS,
        "dtype": "float32",
        "detail": f"cache of {cell.budget}",
        "tokens": sum(map(len, wanted[True])),
    }
    columns = {}
    for variant, (batching, controlled) in WAYS.items():
        found = timings[variant].result["responses"]
        wrong = [prompt for prompt, (got, alone) in enumerate(zip(found, wanted[controlled], strict=True)) if got != alone]
        assert not wrong, f"{cell.name}: {variant} does not respond to prompts {wrong} as `model.generate` does to each alone"
        columns[variant] = {
            **shared,
            "peak_bytes": timings[variant].result["peak_bytes"],
            "wasted_cache": round(use[batching].wasted, 4),
            "cache_bytes": use[batching].most_held * work.plan.bytes_per_token,
            "needed_cache_bytes": use[batching].most_read * work.plan.bytes_per_token,
        }
    assert sum(map(len, wanted[True])) == sum(map(len, wanted[False])), f"{cell.name}: responses are longer with control than without, or shorter"
    return timings, columns
