"""Timing on a device: CUDA events over replays of captured work, and how fast the device copies. On the CPU work runs as it is."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.race import Measure

# Far larger than any cache of a GPU.
COPY_BYTES = 2 * 2**30
TINY_COPY_BYTES = 2**20
# Where a device does not say how large its last-level cache is.
USUAL_L2_BYTES = 64 * 2**20


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_on(device: torch.device) -> Measure:
    """Time by events on the device's own clock, from when it was idle to when it is done; on the CPU by the wall clock."""

    def by_events(run: Callable[[], object]) -> tuple[float, object]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result

    def by_clock(run: Callable[[], object]) -> tuple[float, object]:
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    return by_events if device.type == "cuda" else by_clock


class Captured:
    """Work recorded in a CUDA graph, so that a call is one launch. On the CPU a call does the work.

    Args:
        work: launches kernels of fixed shapes and waits for nothing; its results stay in the same memory.
        device: where.
        warm_ups: how often it runs before, for what is compiled or allocated at first.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device, warm_ups: int = 2) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        # As PyTorch asks: on another stream than the default one, before it is recorded.
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(warm_ups):
                work()
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = work()

    def __call__(self) -> Any:
        """Do the work; what it returned when it was recorded holds the new results."""
        if self._graph is None:
            return self._work()
        self._graph.replay()
        return self._result


@functools.cache
def copy_speed(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Bytes per second of a large copy on the device, those that are read and those that are written; the median of ten."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    measure = measure_on(device)
    seconds = sorted(measure(lambda: target.copy_(source))[0] for _ in range(11))
    return 2 * num_bytes / seconds[len(seconds) // 2]


def cache_bytes(device: torch.device) -> int:
    """The size of the device's last-level cache."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or USUAL_L2_BYTES


def copies_for(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of what a variant reads are needed, so that none is in cache when its turn comes: four times the cache, two at least."""
    return max(2, -(-4 * cache_bytes(device) // bytes_of_one))
