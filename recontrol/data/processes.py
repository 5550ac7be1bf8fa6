"""The processes of `accelerate launch` (or `torchrun`) that make the shards of one folder together."""

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from tqdm.auto import tqdm

from recontrol.checks import required
from recontrol.files import writing_lock

logger = logging.getLogger(__name__)

# Processes finish hours apart, and a collective operation gives up after minutes. One that dies is noticed at once all the same.
PATIENCE = datetime.timedelta(days=30)
Result = TypeVar("Result")


@dataclass
class Peers:
    """This process among those of the job: its number, 0 for the one that does what is done once, their count, and what `wait` goes by."""

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

    def wait(self) -> None:
        """Wait until all have come here; RuntimeError if one of them has died."""
        if self.group is not None:
            distributed.barrier(group=self.group)

    def make_shards(self, has: Callable[[int], bool], make: Callable[[int], None], sizes: Sequence[int], where: Path, unit: str, progress: bool) -> None:
        """Make this process's share of the shards that are missing, of `sizes` in units of the progress bar; return when all processes have."""
        missing = [number for number in range(len(sizes)) if not has(number)]
        # Nobody may write before all have counted.
        self.wait()
        share = missing[self.index :: self.count]
        done = sum(sizes) - sum(sizes[number] for number in share)
        try:
            with tqdm(total=sum(sizes), initial=done, unit=unit, disable=not progress or self.index > 0) as bar:
                for number in share:
                    try:
                        make(number)
                    except ValueError as error:
                        raise ValueError(f"{error}; the shards before it stay in {where}") from error
                    bar.update(sizes[number])
        except KeyboardInterrupt:
            kept = sum(map(has, range(len(sizes))))
            logger.warning("interrupted: %d of %d shards are in %s; the same call goes on from there", kept, len(sizes), where)
            raise
        self.wait()


@contextlib.contextmanager
def writing_together(folder: Path, set_up: Callable[[bool], Result]) -> Iterator[tuple[Peers, Result]]:
    """Hold a folder's lock with all processes of this run; each calls `set_up` (with whether it is the first, which does so before the others)."""
    peers = Peers.current()
    if peers.index > 0:
        # Until the first one has made the folder, made sure that no other run is in it, and lets the others in.
        peers.wait()
    with writing_lock(folder, peers.index == 0) as share:
        result = set_up(peers.index == 0)
        if peers.index == 0 and peers.count > 1:
            share()
            peers.wait()
        yield peers, result
        peers.wait()
