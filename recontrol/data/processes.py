"""The processes of `accelerate launch` (or `torchrun`) that do one job together."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from recontrol.checks import required
from recontrol.files import writing_lock

# Processes finish hours apart, and a collective operation gives up after minutes. One that dies is noticed at once all the same.
PATIENCE = datetime.timedelta(days=30)


Result = TypeVar("Result")


@dataclass
class Peers:
    """This process among those of the job.

    Attributes:
        index: from 0; process 0 does what is done once.
        count: how many there are.
        group: what `wait` goes by, None for a process on its own.
    """

    index: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def current(cls) -> "Peers":
        """The processes that this one was launched with; all of them have to ask for this at the same place."""
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not (launched or (distributed.is_available() and distributed.is_initialized())):
            return cls()
        # Without a GPU, accelerate joins the processes only if told to.
        state = required("accelerate", "train").PartialState(cpu=not torch.cuda.is_available())
        if state.num_processes == 1:
            return cls()
        # Not the group of the gradients: NCCL would give up, and on one device it would not even start.
        return cls(state.process_index, state.num_processes, distributed.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all have come here; RuntimeError if one of them has died."""
        if self.group is not None:
            distributed.barrier(group=self.group)


@contextlib.contextmanager
def writing_together(folder: Path, set_up: Callable[[bool], Result]) -> Iterator[tuple[Peers, Result]]:
    """Hold a folder's lock with all processes of this run inside the block; RuntimeError if another run is writing into the folder.

    Each process calls `set_up` (with whether it is the first), the first one before all others.
    """
    peers = Peers.current()
    if not peers.first:
        # Until the first one has made the folder, made sure that no other run is in it, and lets the others in.
        peers.wait()
    with writing_lock(folder, peers.first) as share:
        result = set_up(peers.first)
        if peers.first and peers.count > 1:
            share()
            peers.wait()
        yield peers, result
