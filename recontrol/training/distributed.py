"""One process or several: what each of them does of a mini-batch, and how they agree."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from recontrol.checks import required, usable_device

# What tells a process how many there are, by who started it: torchrun and accelerate, and three implementations of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """The `count` processes that `accelerate launch` started, or this one alone; each adds the gradient of its share, and the main one alone writes files."""

    def __init__(self, log_with: Any = None, logging_dir: str | os.PathLike | None = None):
        self.count, self.is_main, self._tracked = 1, True, False
        self._accelerator: Any = None
        if log_with is not None or any(int(os.environ.get(name) or 1) > 1 for name in SIZES):
            self._accelerator = required("accelerate", "train").Accelerator(log_with=log_with, project_dir=logging_dir and os.fspath(logging_dir))
            self.count, self.is_main = self._accelerator.num_processes, self._accelerator.is_main_process
        if log_with is not None:
            asked, found = list(log_with) if isinstance(log_with, list | tuple) else [log_with], self._accelerator.log_with
            if len(found) < len(asked) and "all" not in asked:
                raise ImportError(f"found {len(found)} of the trackers {asked!r} installed, wanted all (for example pip install tensorboard)")
            self._tracked = bool(found)

    def device(self, wanted: str | torch.device | None) -> torch.device:
        """Where this process computes: what was asked for, or the device that it was given, or a GPU if there is one."""
        if self.count == 1:
            return usable_device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if wanted is not None and torch.device(wanted).type != self._accelerator.device.type:
            raise ValueError(f"accelerate launch has given {self._accelerator.device} to this process, found device {str(wanted)!r}; leave it out")
        return self._accelerator.device

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a list of responses or prompts; the parts of all are the whole."""
        return indices if self.count == 1 else indices[self._accelerator.process_index :: self.count]

    def add_up(self, parameters: Iterable[Tensor], loss: float) -> float:
        """Replace each gradient by the sum over the processes; returns that of the loss."""
        if self.count == 1:
            return loss
        for parameter in parameters:
            # A process whose share was empty has none.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._accelerator.reduce(gradient, "sum")
        return float(self._accelerator.reduce(torch.tensor([loss], dtype=torch.float64, device=self._accelerator.device), "sum"))

    def gathered(self, found: Any) -> list[Any]:
        """What each process found, the same list in all, which wait for each other."""
        return [found] if self.count == 1 else required("accelerate.utils", "train").gather_object([found])

    @contextlib.contextmanager
    def tracking(self, settings: dict[str, Any]) -> Iterator[None]:
        """A run in the trackers, if there are any; at the end of the block they write what they hold."""
        if self._tracked:
            kept = {name: entry if isinstance(entry, bool | int | float | str) else str(entry) for name, entry in settings.items()}
            self._accelerator.init_trackers("recontrol", config=kept)
        try:
            yield
        finally:
            for tracker in self._accelerator.trackers if self._tracked else ():
                tracker.finish()

    def track(self, entry: dict[str, float | None], step: int) -> None:
        """Hand one entry of the history to the trackers."""
        if self._tracked:
            self._accelerator.log({name: number for name, number in entry.items() if number is not None}, step=step)
