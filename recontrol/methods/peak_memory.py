"""Peak memory of a block of code, beyond what was in use before it."""

import os
import threading
from pathlib import Path
from typing import Self

import torch

from recontrol.checks import required


class PeakMemory:
    """Peak memory inside a block, beyond that in use before it: allocated on a CUDA device, else the resident memory of the process, read every 10 ms."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self._before = self._peak = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def bytes(self) -> int:
        """So far, or in the whole block once it is left."""
        if not self._done.is_set():
            self._read()
        return max(0, self._peak - self._before)

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._read()
        self._before = self._peak
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._read()
        self._done.set()
        self._watcher.join()

    def _read(self) -> None:
        self._peak = max(self._peak, _resident() if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda))

    def _watch(self) -> None:
        while self._cuda is None and not self._done.wait(0.01):
            self._read()


def _resident() -> int:
    """Resident memory of the process, in bytes."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Not Linux.
    return required("psutil", "train").Process().memory_info().rss
