"""The ascent at the paper's settings, against the loops, the dense closed form and the memory floor."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import recontrol
from benchmarks.baselines import Dense, Floor, best_dense, can_compile, frozen_loop, released_loop
from benchmarks.race import REPLAY, Timing, Variant, race
from benchmarks.traffic import traffic
from benchmarks.value_nets import draw_hidden, initialised, trained
from recontrol import ValueFunction

VARIANTS = ("recontrol", "released_loop", "frozen_loop", "dense", "dense_compiled", "floor_once", "floor_read", "floor_copy")
SEED_STATES = 1000
# Of the edit. A unit that comes within rounding of zero may flip a step early or late, which moves an edit of thirty steps
# by its share of one step: 1 / (30 sqrt(2048)), rarely more than once. Precision itself is a matter of the tests.
EDIT_ERROR = 1e-3


@dataclass(frozen=True)
class Cell:
    """One case: `released` says whether the slow loop is worth its time here."""

    layers: int
    weights: str
    batch: int
    step_size: float
    steps: int
    size: int = 4096
    released: bool = True

    @property
    def name(self) -> str:
        """In words."""
        shape = f"H = D = {self.size}, batch {self.batch}"
        return f"{self.layers} layers, {self.weights}, {shape}, alpha {self.step_size}, n {self.steps}"

    @property
    def id(self) -> str:
        """For pytest's -k, for example "2l-trained-b1-a0.5-n30"."""
        return f"{self.layers}l-{self.weights}-b{self.batch}-a{self.step_size}-n{self.steps}"

    @property
    def variants(self) -> tuple[str, ...]:
        """What runs."""
        return tuple(name for name in VARIANTS if self.released or name != "released_loop")


# The paper's shortest and longest ascents of two layers.
TWO_LAYER_SETTINGS = ((0.5, 30), (0.2, 200))
FULL = [
    *(Cell(2, "initialised", batch, *setting) for batch in (1, 8, 32) for setting in TWO_LAYER_SETTINGS),
    # The loops take as long with trained weights, so the longest of them are left out.
    *(Cell(2, "trained", batch, *setting, released=batch * setting[1] <= 400) for batch in (1, 8) for setting in TWO_LAYER_SETTINGS),
    *(Cell(3, "initialised", batch, 0.5, 30) for batch in (1, 8, 32)),
    Cell(3, "trained", 1, 0.5, 30),
]
SMOKE = [
    Cell(2, "initialised", 1, 0.5, 30, 256),
    Cell(2, "trained", 8, 0.5, 30, 256, released=False),
    Cell(3, "initialised", 1, 0.5, 30, 256),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells = SMOKE if metafunc.config.getoption("smoke") else FULL
    pairs = [(cell, variant) for cell in cells for variant in cell.variants]
    metafunc.parametrize(("cell", "variant"), pairs, ids=[f"{cell.id}-{variant}" for cell, variant in pairs])


@pytest.mark.benchmark(timer=REPLAY.time)
def bench_ascend(benchmark: Any, races: Any, smoke: bool, cell: Cell, variant: str) -> None:
    """The first variant of a case runs them all in turn; each test then shows its own."""
    races.replay(benchmark, cell.name, variant, lambda: run(cell, budget=0.05 if smoke else 0.8, most_rounds=5 if smoke else 25))


@functools.cache
def network(layers: int, weights: str, size: int) -> ValueFunction:
    make = trained if weights == "trained" else initialised
    return make(size, (size,) * (layers - 1))


def run(cell: Cell, budget: float, most_rounds: int) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Measure one case and compare every result with the oracle.

    Raises:
        AssertionError: an edit is wrong.
    """
    value = network(cell.layers, cell.weights, cell.size)
    hidden = draw_hidden(cell.batch, cell.size, SEED_STATES)[0]
    setting = (cell.step_size, cell.steps)
    moved = traffic(hidden, value, *setting)
    floor, once = Floor(moved.bytes_moved), Floor(moved.bytes_once)
    dense = best_dense(hidden, value, cell.step_size)
    # The first gradients of the parameters are allocated here, as they are at the first token in life.
    released_loop(hidden, value, cell.step_size, 2)
    ways = {
        "recontrol": Variant("recontrol", lambda: recontrol.ascend(hidden, value, *setting, backend="cpu"), "backend cpu", 5),
        "released_loop": Variant("released_loop", lambda: released_loop(hidden, value, *setting)),
        "frozen_loop": Variant("frozen_loop", lambda: frozen_loop(hidden, value, *setting)),
        "dense": Variant("dense", lambda: dense(hidden, *setting), dense.name, 3),
        "floor_once": Variant("floor_once", once.read, once.reader, 5),
        "floor_read": Variant("floor_read", floor.read, floor.reader, 5),
        "floor_copy": Variant("floor_copy", floor.copy, "copy_", 5),
    }
    if can_compile():
        compiled = Dense(value, dense.layout, dense.along, compiled=True)
        compiled(hidden, cell.step_size, 3)
        ways["dense_compiled"] = Variant("dense_compiled", lambda: compiled(hidden, *setting), compiled.name, 3)
    variants = [ways[name] for name in cell.variants if name in ways]
    timings = race(variants, budget, most_rounds)
    value.zero_grad(set_to_none=True)
    check(timings, hidden, value, cell)
    shared = {
        "suite": "ascend",
        "layers": cell.layers,
        "weights": cell.weights,
        "batch": cell.batch,
        "hidden_size": cell.size,
        "width": cell.size,
        "step_size": cell.step_size,
        "steps": cell.steps,
        "dtype": "float32",
        "bytes_moved": moved.bytes_moved,
        "bytes_once": moved.bytes_once,
        "flips_per_step": round(moved.flips_per_step, 2),
    }
    return timings, {variant.name: {**shared, "detail": variant.detail} for variant in variants}


def check(timings: dict[str, Timing], hidden: Tensor, value: ValueFunction, cell: Cell) -> None:
    """Compare each variant's edit of the last row with the oracle's in float64."""
    last = hidden[-1:]
    target = recontrol.oracle.ascend(last, value, cell.step_size, cell.steps, dtype=torch.float64)
    assert isinstance(target, Tensor)
    wanted = target - last
    for name, timing in timings.items():
        if not name.startswith("floor"):
            error = float((timing.result[-1:] - last - wanted).norm() / wanted.norm())
            assert error < EDIT_ERROR, f"{cell.name}: the edit of {name} is off by {error:.1e} of its norm, allowed is {EDIT_ERROR:.0e}"
