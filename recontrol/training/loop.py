"""The loop over epochs and mini-batches: one optimiser step, early stopping, checkpoints, and going on from one."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.config import TrainConfig
from recontrol.training.distributed import Processes
from recontrol.training.objectives import Objective
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)


def rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of mini-batch `step` of `steps`; it needs no state, so a run can go on from any.

    lr min(1, (step + 1) / warmup_steps) (1 + cos(pi (step - warmup_steps) / (steps - warmup_steps))) / 2, without the last factor where
    the schedule is constant, and during warm-up.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, steps - config.warmup_steps))) / 2


class Learner:
    """V, its optimiser and the average of its weights, and one step of them.

    `evaluate` is V of packed hidden states, on any device, in training.
    """

    def __init__(self, value: ValueFunction, config: TrainConfig, evaluate: Callable[[Tensor], Tensor], processes: Processes):
        self.value, self.config, self.evaluate, self.processes = value, config, evaluate, processes
        self.optimizer: torch.optim.Optimizer
        if config.weight_decay:
            self.optimizer = torch.optim.AdamW(value.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.Adam(value.parameters(), lr=config.learning_rate)
        # After the first step those weights, then decay * average + (1 - decay) * weights.
        self.average = None if config.ema_decay is None else AveragedModel(value, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    @property
    def judged(self) -> ValueFunction:
        """What is validated and kept: the average of the weights if there is one, else the weights."""
        return self.value if self.average is None else cast(ValueFunction, self.average.module)

    @property
    def average_state(self) -> dict[str, Tensor] | None:
        """The average and how many steps are in it."""
        return None if self.average is None else self.average.state_dict()

    def values(self, states: Tensor) -> Tensor:
        """V that is judged, of states on any device."""
        return self.judged(states.to(self.value.device))

    def update(self, objective: Objective, batch: Tensor, learning_rate: float) -> tuple[float, int]:
        """One step on a mini-batch: the sum of its loss, in the unit of the reward, and what to divide it by for the mean."""
        self.optimizer.zero_grad()
        loss, count = objective.backward(self.evaluate, batch)
        self.processes.add_up_gradients(self.value.parameters())
        if self.config.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.value.parameters(), self.config.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.value)
        return self.processes.add_up(loss), count


@dataclass(frozen=True)
class Loop:
    """How often what is done: `batches` mini-batches of nearly equal size an epoch, a checkpoint after some of them; `show` a progress bar."""

    config: TrainConfig
    batches: int
    checkpoint_every: int
    show: bool

    def run(self, learner: Learner, objective: Objective, folder: RunFolder, state: Progress, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train from where `state` is to the end, and change it in place; from the best state dict so far to that of the whole run.

        Raises FloatingPointError where training diverges.
        """

        def save() -> None:
            folder.save(state, learner.value.state_dict(), best, learner.optimizer, learner.average_state)

        total, done = self.config.epochs * self.batches, state.epoch * self.batches + state.position
        bar = tqdm(total=total, initial=done, unit="batch", disable=not (self.show and folder.write))
        loss_name = objective.loss_name.removeprefix("train_")
        try:
            with folder.lock(), bar:
                while state.epoch < self.config.epochs and not self._exhausted(state):
                    # Of equal size, rather than a last one of a few responses whose noise would weigh as much.
                    for batch in self._order(objective.units(state.epoch), state.epoch).tensor_split(self.batches)[state.position :]:
                        self._step(learner, objective, batch, state)
                        if state.position % self.checkpoint_every == 0:
                            save()
                        bar.update()
                        bar.set_postfix({"epoch": state.epoch, loss_name: f"{state.loss / state.count:.4g}"})
                    if self._end_epoch(learner, objective, state):
                        best = {name: tensor.clone() for name, tensor in learner.judged.state_dict().items()}
                    save()
        except KeyboardInterrupt:
            kept = f"the same call goes on from the last checkpoint in {folder.path}" if folder.path is not None else "nothing was kept: there is no out folder"
            logger.warning("interrupted in epoch %d after %d of %d mini-batches; %s", state.epoch, state.position, self.batches, kept)
            raise
        return best

    def _step(self, learner: Learner, objective: Objective, batch: Tensor, state: Progress) -> None:
        done = state.epoch * self.batches + state.position
        loss, count = learner.update(objective, batch, rate(self.config, done, self.config.epochs * self.batches))
        state.loss, state.count = state.loss + loss, state.count + count
        if not math.isfinite(state.loss):
            raise self._diverged(state)
        state.position += 1

    def _end_epoch(self, learner: Learner, objective: Objective, state: Progress) -> bool:
        """Validate, and enter the epoch in the history; whether it is the best so far, which without validation every one is."""
        entry: dict[str, Any] = {"epoch": state.epoch, objective.loss_name: state.loss / state.count, **objective.validate(learner.values)}
        finite = all(math.isfinite(number) for number in entry.values() if number is not None)
        # The last update of an epoch has no loss of its own to show it.
        if not (finite and all(tensor.isfinite().all() for tensor in learner.judged.parameters())):
            raise self._diverged(state)
        learner.processes.track(entry, state.epoch)
        logger.info("%s", ", ".join(f"{name} {number:.4g}" for name, number in entry.items() if number is not None))
        score = objective.score(entry)
        before = objective.score(state.history[state.best_epoch]) if state.best_epoch >= 0 else None
        better = score is None or before is None or score > before
        state.history.append(entry)
        if better:
            state.best_epoch = state.epoch
        state.epoch, state.position, state.loss, state.count = state.epoch + 1, 0, 0.0, 0
        return better

    def _order(self, units: Tensor, epoch: int) -> Tensor:
        return units[torch.from_numpy(np.random.default_rng([self.config.seed, epoch]).permutation(len(units)))]

    def _exhausted(self, state: Progress) -> bool:
        patience = self.config.patience
        return patience is not None and state.best_epoch >= 0 and state.epoch - 1 - state.best_epoch >= patience

    def _diverged(self, state: Progress) -> FloatingPointError:
        return FloatingPointError(f"training diverged in epoch {state.epoch}; lower learning_rate, now {self.config.learning_rate}")
