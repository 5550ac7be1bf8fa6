"""One process or several: what each of them does of a mini-batch, and how they agree."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recontrol.checks import required

# What tells a process how many there are, by who started it: torchrun and accelerate, and three implementations of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """The processes that `accelerate launch` started, or this one alone, which needs no accelerate unless something is tracked.

    All hold the same weights. Each computes the gradient of its share of a mini-batch; the gradients are added up, and all take the
    same step. The main one alone writes files.
    """

    def __init__(self, log_with: Any = None, logging_dir: str | os.PathLike | None = None):
        self._accelerator: Any = None
        if log_with is not None or any(int(os.environ.get(name) or 1) > 1 for name in SIZES):
            folder = None if logging_dir is None else os.fspath(logging_dir)
            self._accelerator = required("accelerate", "train").Accelerator(log_with=log_with, project_dir=folder)
        asked = [] if log_with is None else list(log_with) if isinstance(log_with, list | tuple) else [log_with]
        found = self._accelerator.log_with if asked else []
        if len(found) < len(asked) and "all" not in asked:
            raise ImportError(f"found {len(found)} of the trackers {asked!r} installed, wanted all (for example pip install tensorboard)")
        self._tracked = bool(found)

    @property
    def count(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes if self._accelerator else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and messages."""
        return self._accelerator is None or self._accelerator.is_main_process

    def device(self, wanted: str | torch.device | None) -> torch.device:
        """Where this process computes: what was asked for, or the device that it was given, or a GPU if there is one."""
        if self.count == 1:
            return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if wanted is not None and torch.device(wanted).type != self._accelerator.device.type:
            raise ValueError(f"accelerate launch has given {self._accelerator.device} to this process, found device {str(wanted)!r}; leave it out")
        return self._accelerator.device

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a list of responses or prompts; the parts of all are the whole."""
        return indices if self.count == 1 else indices[self._accelerator.process_index :: self.count]

    def add_up_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over the processes."""
        if self.count > 1:
            for parameter in parameters:
                # A process whose share was empty has none.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(gradient, "sum")

    def add_up(self, number: float) -> float:
        """The sum of a number over the processes."""
        if self.count == 1:
            return number
        return float(self._accelerator.reduce(torch.tensor([number], dtype=torch.float64, device=self._accelerator.device), "sum"))

    def merged(self, counts: Any) -> Any:
        """What all processes counted together, the same in each; `counts` have a method `merge`."""
        if self.count == 1:
            return counts
        first, *others = required("accelerate.utils", "train").gather_object([counts])
        for other in others:
            first.merge(other)
        return first

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def start_tracking(self, settings: dict[str, Any]) -> None:
        """Begin a run in the trackers, if there are any."""
        if self._tracked:
            kept = {name: entry if isinstance(entry, bool | int | float | str) else str(entry) for name, entry in settings.items()}
            self._accelerator.init_trackers("recontrol", config=kept)

    def track(self, entry: dict[str, float | None], step: int) -> None:
        """Hand one entry of the history to the trackers."""
        if self._tracked:
            self._accelerator.log({name: number for name, number in entry.items() if number is not None}, step=step)

    def stop_tracking(self) -> None:
        """End the run in the trackers, so that what they hold is written."""
        if self._tracked:
            for tracker in self._accelerator.trackers:
                tracker.finish()
