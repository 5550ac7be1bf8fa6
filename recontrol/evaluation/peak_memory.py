"""The most memory that a block of code holds, beyond what there was before it."""

import threading
from typing import Self

import psutil
import torch

# Seconds between two looks at the memory of the process.
INTERVAL = 0.01


class PeakMemory:
    """The most memory in use inside a block, beyond that in use before it.

    Args:
        device: of the model; of a CUDA device what is allocated counts, else the resident memory of the process, looked at a hundred times a second.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process()
        self._before = self._peak = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def bytes(self) -> int:
        """So far, or in the whole block once it is left."""
        if not self._done.is_set():
            self._look()
        return max(0, self._peak - self._before)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = self._peak = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._peak = self._process.memory_info().rss
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._look()
        self._done.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _look(self) -> None:
        cuda = self._device.type == "cuda"
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) if cuda else self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()
