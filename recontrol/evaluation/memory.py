"""The most memory that a block of code held, beyond what there was before it."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

# How often the memory of a process is looked at where nobody keeps its peak, in seconds.
INTERVAL = 0.01


@dataclass
class Peak:
    """What was measured; complete at the end of the block.

    Attributes:
        bytes: of the device's allocator on a GPU, else of the process's resident memory.
    """

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of memory inside the block, beyond that at its beginning.

    Args:
        device: a GPU, whose allocator keeps its peak; else the process is looked at a hundred times a second by a thread.
    """
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    def watch() -> None:
        while not done.wait(INTERVAL):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()
