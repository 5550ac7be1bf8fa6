"""The loop over epochs and mini-batches with early stopping, and the folder of a run: its history, and a checkpoint to go on from after a kill."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from recontrol.data.identity import unknown
from recontrol.files import check_same_settings, read_json, remove_leftovers, write_aside, write_json, writing_lock
from recontrol.training.config import TrainConfig, in_present_names
from recontrol.training.distributed import Processes
from recontrol.training.objectives import Objective
from recontrol.value import ValueFunction
from recontrol.value.files import CONFIG_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)

FORMAT, HISTORY_NAME, CHECKPOINT_NAME = "recontrol.training", "history.json", "checkpoint.safetensors"
# A state dict.
State = dict[str, Tensor]


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
    """The files of a training run: history, checkpoint or value function; with no path, none. A run with other `settings` in the same folder is refused."""

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any], *, write: bool = True):
        self.path, self.write = None if path is None else Path(path), write and path is not None
        # As it will read back: tuples become lists.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.finished, self.history = False, list[dict[str, Any]]()
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

    def save(self, progress: Progress, best: State, weights: State, optimizer: torch.optim.Optimizer, average: State) -> None:
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

    def load(self, weights: State, optimizer: torch.optim.Optimizer, average: State) -> tuple[Progress, State]:
        """Fill in state dicts and moments from the checkpoint, if there is one: how far the run was, and the weights of its best epoch."""
        if self.path is None or not (self.path / CHECKPOINT_NAME).exists():
            return Progress(), {}
        path = self.path / CHECKPOINT_NAME
        try:
            with safe_open(path, "pt") as file:
                settings, progress = json.loads(file.metadata()["settings"]), Progress(**json.loads(file.metadata()["progress"]))
                # Each tensor gets memory of its own: those of a file may be unaligned, and are unmapped with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
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
        moments: dict[int, State] = {}
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
        check_same_settings({**before, **in_present_names(found)}, self.settings, f"{path} is of a run with", ignored=unknown(found, "reward_sha256"))

    def _write_history(self, progress: Progress, *, finished: bool = False) -> None:
        assert self.path is not None
        state = {"finished": finished, "best_epoch": progress.best_epoch, "epochs": progress.history}
        write_json(self.path / HISTORY_NAME, {"format": FORMAT, "settings": self.settings, **state})


def rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of mini-batch `step` of `steps`: a linear warm-up, then constant or half a cosine. It needs no state to go on from any."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, steps - config.warmup_steps))) / 2


class Learner:
    """V, its optimiser and the average of its weights; `evaluate` is V of packed hidden states, on any device, in training."""

    def __init__(self, value: ValueFunction, config: TrainConfig, evaluate: Callable[[Tensor], Tensor], processes: Processes):
        self.value, self.config, self.evaluate, self.processes = value, config, evaluate, processes
        # Without decay it is Adam.
        self.optimizer = torch.optim.AdamW(value.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        # After the first step those weights, then decay * average + (1 - decay) * weights.
        self.average = None if config.ema_decay is None else AveragedModel(value, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        # What is validated and kept.
        self.judged = value if self.average is None else cast(ValueFunction, self.average.module)

    def state(self) -> tuple[State, torch.optim.Optimizer, State]:
        """What a checkpoint holds of it: the weights, the optimiser, and the average with how many steps are in it."""
        return self.value.state_dict(), self.optimizer, {} if self.average is None else self.average.state_dict()

    def update(self, objective: Objective, batch: Tensor, learning_rate: float) -> tuple[float, int]:
        """One step on a mini-batch: the sum of its loss, in the unit of the reward, and what to divide it by for the mean."""
        self.optimizer.zero_grad()
        own, count = objective.backward(self.evaluate, batch)
        loss = self.processes.add_up(self.value.parameters(), own)
        if self.config.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.value.parameters(), self.config.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.value)
        return loss, count


def run(learner: Learner, objective: Objective, folder: RunFolder, state: Progress, best: State, batches: int, checkpoint_every: int, show: bool) -> State:
    """Train from `state`, changed in place, to the end, in epochs of `batches` equal mini-batches; from the best state dict so far to that of the run."""
    config, steps = learner.config, learner.config.epochs * batches
    bar = tqdm(total=steps, initial=state.epoch * batches + state.position, unit="batch", disable=not (show and learner.processes.is_main))
    try:
        # Of several processes, the one that writes holds the lock for all.
        with writing_lock(folder.path) if folder.path is not None and folder.write else contextlib.nullcontext(), bar:
            while state.epoch < config.epochs and (state.best_epoch < 0 or state.epoch - 1 - state.best_epoch < (config.patience or math.inf)):
                order = torch.from_numpy(np.random.default_rng([config.seed, state.epoch]).permutation(len(objective.units)))
                for batch in objective.data.in_epoch(state.epoch, objective.units[order]).tensor_split(batches)[state.position :]:
                    loss, count = learner.update(objective, batch, rate(config, state.epoch * batches + state.position, steps))
                    state.loss, state.count = state.loss + loss, state.count + count
                    if not math.isfinite(state.loss):
                        raise _diverged(config, state)
                    state.position += 1
                    if state.position % checkpoint_every == 0:
                        folder.save(state, best, *learner.state())
                    bar.update()
                    bar.set_postfix({"epoch": state.epoch, objective.loss_name.removeprefix("train_"): f"{state.loss / state.count:.4g}"})
                if _end_epoch(learner, objective, state):
                    best = {name: tensor.clone() for name, tensor in learner.judged.state_dict().items()}
                folder.save(state, best, *learner.state())
    except KeyboardInterrupt:
        kept = f"the same call goes on from the last checkpoint in {folder.path}" if folder.path is not None else "nothing was kept: there is no out folder"
        logger.warning("interrupted in epoch %d after %d of %d mini-batches; %s", state.epoch, state.position, batches, kept)
        raise
    return best


def _end_epoch(learner: Learner, objective: Objective, state: Progress) -> bool:
    """Validate, and enter the epoch in the history; whether it is the best so far, which without validation every one is."""
    scores = objective.validate(lambda states: learner.judged(states.to(learner.value.device)))
    entry: dict[str, Any] = {"epoch": state.epoch, objective.loss_name: state.loss / state.count, **scores}
    finite = all(math.isfinite(number) for number in entry.values() if number is not None)
    # The last update of an epoch has no loss of its own to show it.
    if not (finite and all(tensor.isfinite().all() for tensor in learner.judged.parameters())):
        raise _diverged(learner.config, state)
    learner.processes.track(entry, state.epoch)
    logger.info("%s", ", ".join(f"{name} {number:.4g}" for name, number in entry.items() if number is not None))
    score = objective.score(entry)
    before = objective.score(state.history[state.best_epoch]) if state.best_epoch >= 0 else None
    better = score is None or before is None or score > before
    state.history.append(entry)
    state.best_epoch = state.epoch if better else state.best_epoch
    state.epoch, state.position, state.loss, state.count = state.epoch + 1, 0, 0.0, 0
    return better


def _diverged(config: TrainConfig, state: Progress) -> FloatingPointError:
    return FloatingPointError(f"training diverged in epoch {state.epoch}; lower learning_rate, now {config.learning_rate}")
