"""The folder of a training run: settings and history to read, and a checkpoint to go on from after a kill."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recontrol.data.identity import unknown
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json
from recontrol.training.config import TrainConfig, in_present_names
from recontrol.value.files import CONFIG_NAME, WEIGHTS_NAME

FORMAT = "recontrol.training"
HISTORY_NAME = "history.json"
CHECKPOINT_NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a run is: `position` mini-batches of an epoch, and the sum of their loss over `count` tokens, responses or pairs."""

    # The order of responses follows from the seed and the epoch, so no generator's state is part of it.

    epoch: int = 0
    position: int = 0
    loss: float = 0.0
    count: int = 0
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)


class RunFolder:
    """The files of one training run; with no path, none.

    A run that is under way has `history.json` and `checkpoint.safetensors`; a finished one has the value function and a `history.json`
    that says so. `settings` decide the result; a run with others in the same folder is refused. One of several processes writes.
    """

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any], *, write: bool = True):
        self.path, self.write = None if path is None else Path(path), write and path is not None
        # As it will read back: tuples become lists.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.finished = False
        self.history: list[dict[str, Any]] = []
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; training writes into a folder")
        if (path := self.path / HISTORY_NAME).exists():
            content = read_json(path)
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            if found != FORMAT or not isinstance(content.get("settings"), dict) or not isinstance(content.get("epochs"), list):
                raise ValueError(f"{path} is not the history of a training run: found format {found!r}, wanted {FORMAT!r}; use another folder")
            self._compare(content["settings"], path)
            self.finished, self.history = bool(content.get("finished")), [in_present_names(entry) for entry in content["epochs"]]
        elif foreign := [name for name in (CONFIG_NAME, WEIGHTS_NAME, CHECKPOINT_NAME) if (self.path / name).exists()]:
            raise ValueError(f"{self.path} holds {', '.join(foreign)} but no {HISTORY_NAME}: it is not the folder of a training run; use another folder")
        elif self.write:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_history(Progress())
        if self.write:
            remove_leftovers(self.path)
            if self.finished:
                (self.path / CHECKPOINT_NAME).unlink(missing_ok=True)

    def save(
        self, progress: Progress, best: dict[str, Tensor], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
    ) -> None:
        """Write the checkpoint, whole or not at all; of the optimiser its moments, not its settings."""
        if self.path is None or not self.write:
            return
        groups = {"weights": weights, "best": best, "average": average}
        groups |= {f"optimizer.{index}": state for index, state in optimizer.state_dict()["state"].items()}
        content = {f"{group}.{name}": tensor.detach().cpu().contiguous() for group, state in groups.items() for name, tensor in state.items()}
        with write_aside(self.path / CHECKPOINT_NAME) as aside:
            aside.write_bytes(save(content, metadata={"format": FORMAT, "progress": json.dumps(asdict(progress)), "settings": json.dumps(self.settings)}))
        # The history in the checkpoint is the one that counts; this one is for reading while the run goes on.
        if progress.position == 0:
            self._write_history(progress)

    def load(self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> tuple[Progress, dict[str, Tensor]]:
        """Fill in state dicts and moments from the checkpoint, if there is one: how far the run was, and the weights of its best epoch."""
        if self.path is None or not (self.path / CHECKPOINT_NAME).exists():
            return Progress(), {}
        path = self.path / CHECKPOINT_NAME
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                # Each tensor gets memory of its own: those of a file may be unaligned, and are unmapped with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            progress, settings = Progress(**json.loads(metadata["progress"])), json.loads(metadata["settings"])
            progress.history = [in_present_names(entry) for entry in progress.history]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole checkpoint ({error}); delete it to train from the beginning") from error
        self._compare(settings, path)
        state = {f"weights.{name}": tensor for name, tensor in weights.items()} | {f"average.{name}": tensor for name, tensor in average.items()}
        found, wanted = ({name: each[name].shape for name in each if name.startswith(("weights.", "average."))} for each in (tensors, state))
        if found != wanted:
            raise ValueError(f"{path} is of another value function: found {found}, wanted {wanted}; delete it to train from the beginning")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for group, index, kind in (name.split(".", 2) for name in tensors if name.startswith("optimizer.")):
            moments.setdefault(int(index), {})[kind] = tensors[f"{group}.{index}.{kind}"]
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return progress, {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}

    def finish(self, progress: Progress) -> None:
        """Say that the value function beside it is the result, and remove the checkpoint."""
        if self.path is not None and self.write:
            self._write_history(progress, finished=True)
            (self.path / CHECKPOINT_NAME).unlink(missing_ok=True)

    def _compare(self, found: dict[str, Any], path: Path) -> None:
        # What a run of an earlier release does not name was not there to be set.
        before = {name: entry for name, entry in TrainConfig(kernel="torch", validation_fraction=0.0).record().items() if name in self.settings}
        what = f"{path} is of a run with"
        check_same_settings({**before, **in_present_names(found)}, self.settings, what, ignored=unknown(found, "reward_sha256"))

    def _write_history(self, progress: Progress, *, finished: bool = False) -> None:
        assert self.path is not None
        content = {"settings": self.settings, "finished": finished, "best_epoch": progress.best_epoch, "epochs": progress.history}
        write_json(self.path / HISTORY_NAME, {"format": FORMAT, **content})
