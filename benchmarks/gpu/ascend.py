"""The ascent on a GPU at the paper's settings and beyond, against the released loop, dense PyTorch in a CUDA graph, and the copy of the bytes."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import recontrol
from benchmarks.baselines import can_compile, quickest, released_loop
from benchmarks.gpu.dense import FORMS, DenseForm
from benchmarks.gpu.records import Outcome
from benchmarks.gpu.timing import COPY_BYTES, TINY_COPY_BYTES, Captured, copies_for, copy_speed, measure_on, synchronize
from benchmarks.race import Timing, Variant, race
from benchmarks.traffic import traffic
from benchmarks.value_nets import draw_hidden, initialised, trained
from recontrol import ValueFunction
from recontrol.ascent.backends import BACKENDS, capturable

# From hidden states and a value function to the edited states.
Ascend = Callable[[Tensor, ValueFunction], Tensor]
SEED_STATES = 1000
# Of the edit: no measure of precision, which is a matter of the tests. In bfloat16 dense steps round each c, and a unit may flip a step early.
EDIT_ERROR = 1e-2
REPLAYS = 4
# What can be captured; "cpu" is there so that all of this runs without a GPU.
OURS = {"cuda": capturable(), "cpu": ("cpu", "triton")}


@dataclass(frozen=True)
class Cell:
    """One case; `released` and `compiled` say whether the slow loop, and compiling the dense steps, are worth their time here."""

    layers: int
    weights: str
    batch: int
    step_size: float
    steps: int
    size: int = 4096
    released: bool = True
    compiled: bool = True

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.layers} layers, {self.weights}, H = D = {self.size}, batch {self.batch}, alpha {self.step_size}, n {self.steps}"


BATCHES = (1, 8, 32, 256)
# The most telling first, because the run may be cut off.
FULL = (
    *(Cell(2, "initialised", batch, 0.5, 30) for batch in BATCHES),
    *(Cell(2, "initialised", batch, 0.2, 200, released=batch <= 32) for batch in BATCHES),
    *(Cell(3, "initialised", batch, 0.5, 30) for batch in BATCHES),
    *(Cell(2, "trained", batch, 0.5, 30, released=False) for batch in BATCHES),
    *(Cell(2, "trained", batch, 0.2, 200, released=False) for batch in BATCHES),
    Cell(3, "trained", 1, 0.5, 30, released=False),
    Cell(3, "initialised", 1, 0.2, 200, released=False),
    # Larger and larger steps flip more and more units: where does dense PyTorch become the quicker way?
    *(Cell(2, "initialised", batch, alpha, 30, released=False, compiled=False) for batch in (1, 32, 256) for alpha in (2.0, 8.0, 32.0, 128.0)),
)
TINY = (
    Cell(2, "initialised", 1, 0.5, 3, 16),
    Cell(2, "trained", 3, 0.2, 4, 16, released=False),
    Cell(3, "initialised", 2, 0.5, 3, 16, compiled=False),
)


def run(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """The cases by name, each with what measures it."""
    for cell in TINY if tiny else FULL:
        yield cell.name, functools.partial(measure, cell, device, tiny)


@functools.cache
def network(layers: int, weights: str, size: int, device: torch.device) -> ValueFunction:
    """The same on every call, float32."""
    dims = (size,) * (layers - 1)
    return trained(size, dims, device) if weights == "trained" else initialised(size, dims).to(device)


@functools.cache
def copies(layers: int, weights: str, size: int, device: torch.device) -> list[ValueFunction]:
    """bfloat16 copies of a network, so many that the one whose turn it is lies in no cache; what follows from the weights is ready."""
    value = network(layers, weights, size, device)
    found = [copy.deepcopy(value).bfloat16() for _ in range(copies_for(2 * size * size, device))]
    for value in found:
        value.requires_grad_(False).prepared()
    return found


class Bench:
    """One case on a device: copies of the network, states for each, and the edit that is right.

    Args:
        cell: the case.
        device: where.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.setting = (cell.step_size, cell.steps)
        self.values = copies(cell.layers, cell.weights, cell.size, device)
        self.states = [draw_hidden(cell.batch, cell.size, SEED_STATES + k)[0].to(device) for k in range(len(self.values))]
        self.half = [state.bfloat16() for state in self.states]
        self._last = self.states[0][-1:]
        oracle = recontrol.oracle.ascend(self._last, self.values[0], *self.setting, dtype=torch.float64)
        assert isinstance(oracle, Tensor)
        self._wanted = oracle - self._last

    def check(self, ascend: Ascend) -> None:
        """Compare with the oracle; with states in float32, because rounded to bfloat16 the result says little about the edit.

        Raises:
            AssertionError: the edit is off.
        """
        found = ascend(self.states[0], self.values[0])[-1:] - self._last
        error = float((found - self._wanted).norm() / self._wanted.norm())
        # Not `error > allowed`, which is false for NaN.
        if not error <= EDIT_ERROR:
            raise AssertionError(f"the edit is off by {error:.1e} of its norm, allowed is {EDIT_ERROR:.0e}")

    def capture(self, ascend: Ascend) -> Captured:
        """One ascent of each copy, in one graph, which computes what is computed without it."""
        work = Captured(lambda: [ascend(hidden, value) for hidden, value in zip(self.half, self.values, strict=True)], self.device)
        torch.testing.assert_close(work()[-1], ascend(self.half[-1], self.values[-1]))
        return work

    def ours(self, backend: str) -> Variant:
        """An ascent by one of our backends.

        Raises:
            RuntimeError: it cannot run here.
        """
        status = BACKENDS[backend].status()
        if not status["available"]:
            raise RuntimeError(status["reason"])
        ascend = functools.partial(_ours, setting=self.setting, backend=backend)
        self.check(ascend)
        replays = REPLAYS if self.device.type == "cuda" else 1
        several = functools.partial(_several, self.capture(ascend), replays)
        return Variant(f"recontrol_{backend}", several, f"backend {backend}", 5, replays * len(self.values))

    def best_dense(self) -> DenseForm:
        """The quickest of the dense forms that are right, by a few captured steps of each."""
        candidates = []
        for form, along in itertools.product(FORMS if self.device.type == "cuda" else ("float32", "bfloat16"), ("rows", "columns")):
            dense = DenseForm(self.values[0], form, along)
            try:
                self.check(self.each(dense))
            except AssertionError:
                continue
            candidates.append((dense, self.capture(self.each(dense, min(self.cell.steps, 6)))))
        if not candidates:
            raise AssertionError("no dense form is right")
        return quickest(candidates, lambda candidate: (candidate[1](), synchronize(self.device)))[0]

    def each(self, dense: DenseForm, steps: int | None = None) -> Ascend:
        """A dense form for every copy of the network, with matrices that are made once."""
        forms = {id(value): replace(dense, value=value) for value in self.values}
        return lambda hidden, value: forms[id(value)](hidden, self.cell.step_size, steps or self.cell.steps)

    def dense(self, form: DenseForm) -> Variant:
        """An ascent by dense steps."""
        self.check(self.each(form))
        return Variant("dense_compiled" if form.compiled else "dense", self.capture(self.each(form)), form.name, 3, len(self.values))

    def dense_compiled(self, form: DenseForm) -> Variant:
        """The same, each step compiled."""
        try:
            return self.dense(replace(form, compiled=True))
        except torch._dynamo.exc.TorchDynamoException as error:
            # Not every release of the compiler takes products of bfloat16 whose sums are float32.
            print(f"{self.cell.name}: {form.name} does not compile ({type(error).__name__}); float32 is compiled instead", flush=True)
            return self.dense(replace(form, form="float32", compiled=True))

    def released(self) -> Variant:
        """The released code's loop, in float32 as it was released: in bfloat16 its small steps would be lost."""
        wide = [copy.deepcopy(value).float().requires_grad_() for value in self.values]
        self.check(lambda hidden, _: released_loop(hidden, wide[0], *self.setting))
        turns = itertools.cycle(zip(self.states, wide, strict=True))
        return Variant("released_loop", lambda: released_loop(*next(turns), *self.setting), "float32, no graph")


def measure(cell: Cell, device: torch.device, tiny: bool) -> Outcome:
    """Time one case; each variant is compared with the oracle first, and has no row where it is wrong."""
    outcome, bench, variants = Outcome(), Bench(cell, device), []
    for backend in OURS[device.type]:
        if cell.layers == 2 or backend != "triton":
            with outcome.attempt(f"recontrol_{backend}"):
                variants.append(bench.ours(backend))
    with outcome.attempt("dense"):
        best = bench.best_dense()
        variants.append(bench.dense(best))
        if cell.compiled and can_compile():
            with outcome.attempt("dense_compiled"):
                variants.append(bench.dense_compiled(best))
    if cell.released:
        with outcome.attempt("released_loop"):
            variants.append(bench.released())
    outcome.timings = race(variants, 0.01 if tiny else 0.2, 2 if tiny else 30, measure_on(device))
    outcome.columns = {variant.name: {"detail": variant.detail} for variant in variants}
    counted = traffic(bench.half[0].float(), copy.deepcopy(bench.values[0]).float(), *bench.setting)
    # Counted for float32; here weights and G have two bytes.
    moved, once = counted.bytes_moved // 2, counted.bytes_once // 2
    speed = copy_speed(device, TINY_COPY_BYTES if tiny else COPY_BYTES)
    for name, num_bytes in (("floor_once", once), ("floor_copy", moved)):
        outcome.timings[name], outcome.columns[name] = Timing([num_bytes / speed]), {"detail": "bytes over copy speed"}
    outcome.shared = {
        "suite": "ascend",
        "layers": cell.layers,
        "weights": cell.weights,
        "batch": cell.batch,
        "hidden_size": cell.size,
        "width": cell.size,
        "step_size": cell.step_size,
        "steps": cell.steps,
        "dtype": "bfloat16",
        "bytes_moved": moved,
        "bytes_once": once,
        "flips_per_step": round(counted.flips_per_step, 2),
        "copy_gb_per_s": round(speed / 1e9, 1),
    }
    return outcome


def _several(work: Callable[[], Any], replays: int) -> Any:
    """Replay more than once: the host queues the next while the first runs, so its own time hardly counts."""
    for _ in range(replays - 1):
        work()
    return work()


def _ours(hidden: Tensor, value: ValueFunction, setting: tuple[float, int], backend: str) -> Any:
    return recontrol.ascend(hidden, value, *setting, backend=backend)
