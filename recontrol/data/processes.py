"""The processes of `accelerate launch` (or `torchrun`) that do one job together."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

# Processes finish hours apart, and a collective operation gives up after minutes. One that dies is noticed at once all the same.
PATIENCE = datetime.timedelta(days=30)


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
        import torch
        import torch.distributed as distributed

        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not (launched or (distributed.is_available() and distributed.is_initialized())):
            return cls()
        from accelerate import PartialState

        # Without a GPU, accelerate joins the processes only if it is told that this is meant.
        state = PartialState(cpu=not torch.cuda.is_available())
        if state.num_processes == 1:
            return cls()
        # Not the group of the gradients: NCCL would give up, and on one device it would not even start.
        return cls(state.process_index, state.num_processes, distributed.new_group(backend="gloo", timeout=PATIENCE))

    def wait(self) -> None:
        """Wait until all have come here.

        Raises:
            RuntimeError: one of them has died.
        """
        if self.group is not None:
            import torch.distributed as distributed

            distributed.barrier(group=self.group)
