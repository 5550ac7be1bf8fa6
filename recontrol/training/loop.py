"""The loop over epochs and mini-batches: one optimiser step, early stopping, checkpoints, and going on from one."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.distributed import Processes
from recontrol.training.optimisation import Optimisation
from recontrol.training.tasks import Task
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)


class Learner:
    """V, its optimiser and the average of its weights, and one step of them.

    Args:
        value: the weights, changed in place.
        optimisation: the settings of the optimiser.
        evaluate: V of packed hidden states, on any device, in training.
        processes: the processes that share the work.
    """

    def __init__(self, value: ValueFunction, optimisation: Optimisation, evaluate: Callable[[Tensor], Tensor], processes: Processes):
        self.value, self.optimisation, self.evaluate, self.processes = value, optimisation, evaluate, processes
        self.optimizer = optimisation.optimizer(value.parameters())
        self.average = optimisation.average(value)

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

    def update(self, task: Task, batch: Tensor, learning_rate: float) -> tuple[float, int]:
        """One step on a mini-batch of the task's units.

        Returns:
            The sum of its loss, in the unit of the reward, and what to divide it by for the mean.
        """
        self.optimizer.zero_grad()
        loss, count = task.backward(self.evaluate, batch)
        self.processes.add_up_gradients(self.value.parameters())
        self.optimisation.clip(self.value.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.value)
        return self.processes.add_up(loss), count


@dataclass(frozen=True)
class Loop:
    """How often what is done.

    Args:
        epochs: passes over the training data at most.
        batches: mini-batches of an epoch, of nearly equal size.
        seed: of the order.
        patience: stop after so many epochs without a better one, or None.
        checkpoint_every: mini-batches between checkpoints.
        show: show a progress bar.
    """

    epochs: int
    batches: int
    seed: int
    patience: int | None
    checkpoint_every: int
    show: bool

    def run(self, learner: Learner, task: Task, folder: RunFolder, state: Progress, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train from where `state` is to the end.

        Args:
            learner: the weights.
            task: the objective on the data.
            folder: where checkpoints go.
            state: how far the run is; changed in place.
            best: the state dict of the best epoch so far, empty before the first is done.

        Returns:
            The state dict of the best epoch.

        Raises:
            FloatingPointError: training diverged.
            OSError: a checkpoint cannot be written.
            RuntimeError: another run is writing into the folder.
        """
        rate = learner.optimisation.learning_rate
        bar = tqdm(
            total=self.epochs * self.batches, initial=state.epoch * self.batches + state.position, unit="batch", disable=not (self.show and folder.write)
        )
        try:
            with folder.lock(), bar:
                while state.epoch < self.epochs and not self._exhausted(state):
                    # Of equal size, rather than a last one of a few responses whose noise would weigh as much.
                    for batch in self._order(task.units, state.epoch).tensor_split(self.batches)[state.position :]:
                        self._step(learner, task, batch, state)
                        if state.position % self.checkpoint_every == 0:
                            folder.save(state, learner.value.state_dict(), best, learner.optimizer, learner.average_state)
                        bar.update()
                        bar.set_postfix({"epoch": state.epoch, task.loss_name.removeprefix("train_"): f"{state.loss / state.count:.4g}"})
                    entry: dict[str, Any] = {"epoch": state.epoch, task.loss_name: state.loss / state.count, **task.validate(learner.values)}
                    # The last update of an epoch has no loss of its own to show it.
                    if not (_finite(entry) and all(tensor.isfinite().all() for tensor in learner.judged.parameters())):
                        raise _diverged(state, rate)
                    learner.processes.track(entry, state.epoch)
                    logger.info("%s", ", ".join(f"{name} {number:.4g}" for name, number in entry.items() if number is not None))
                    state.history.append(entry)
                    if _better(entry, state):
                        state.best_epoch = state.epoch
                        best = {name: tensor.clone() for name, tensor in learner.judged.state_dict().items()}
                    state.epoch, state.position, state.loss, state.count = state.epoch + 1, 0, 0.0, 0
                    folder.save(state, learner.value.state_dict(), best, learner.optimizer, learner.average_state)
        except KeyboardInterrupt:
            kept = f"the same call goes on from the last checkpoint in {folder.path}" if folder.path is not None else "nothing was kept: there is no out folder"
            logger.warning("interrupted in epoch %d after %d of %d mini-batches; %s", state.epoch, state.position, self.batches, kept)
            raise
        return best

    def _step(self, learner: Learner, task: Task, batch: Tensor, state: Progress) -> None:
        done = state.epoch * self.batches + state.position
        rate = learner.optimisation.rate(done, self.epochs * self.batches)
        loss, count = learner.update(task, batch, rate)
        state.loss, state.count = state.loss + loss, state.count + count
        if not math.isfinite(state.loss):
            raise _diverged(state, learner.optimisation.learning_rate)
        state.position += 1

    def _order(self, units: Tensor, epoch: int) -> Tensor:
        return units[torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(units)))]

    def _exhausted(self, state: Progress) -> bool:
        return self.patience is not None and state.best_epoch >= 0 and state.epoch - 1 - state.best_epoch >= self.patience


def _diverged(state: Progress, learning_rate: float) -> FloatingPointError:
    return FloatingPointError(f"training diverged in epoch {state.epoch}; lower learning_rate, now {learning_rate}")


def _finite(entry: dict[str, Any]) -> bool:
    return all(math.isfinite(number) for number in entry.values() if number is not None)


def _better(entry: dict[str, Any], state: Progress) -> bool:
    """Whether an epoch is the best so far; without validation every one is."""
    validated = "validation_preference_loss" in entry or "validation_mc_error" in entry
    return not validated or state.best_epoch < 0 or _score(entry) > _score(state.history[state.best_epoch])


def _score(entry: dict[str, Any]) -> float:
    """What the best epoch has most of.

    For pairs, minus the loss of their order; else minus the Monte Carlo error, each head's in units of its flat error where that
    is defined.
    """
    if "validation_preference_loss" in entry:
        return -entry["validation_preference_loss"]
    explained = entry["validation_explained_variance"]
    return -entry["validation_mc_error"] if explained is None else explained
