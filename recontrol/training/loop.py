"""The loop over epochs and mini-batches: one optimiser step, early stopping, checkpoints, and going on from one."""

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from recontrol.files import writing_lock
from recontrol.training.checkpoint import Progress, RunFolder, State
from recontrol.training.config import TrainConfig
from recontrol.training.distributed import Processes
from recontrol.training.objectives import Objective
from recontrol.value import ValueFunction

logger = logging.getLogger(__name__)


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
    """Train from where `state` is to the end, and change it in place; from the best state dict so far to that of the whole run.

    An epoch is `batches` mini-batches of equal size, rather than a last one of a few responses whose noise would weigh as much.
    """
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
