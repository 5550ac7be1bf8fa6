"""How weights move: the optimiser, its learning rate over a run, clipped gradients, and an average of the weights."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Optimisation:
    """The settings of the optimiser.

    Args:
        learning_rate: the largest one, above 0.
        weight_decay: of AdamW, at least 0; with 0 it is Adam.
        warmup_steps: mini-batches over which the learning rate rises from 0.
        schedule: one of `SCHEDULES`: what the learning rate does after that.
        max_gradient_norm: longer gradients are cut to this norm; None leaves them.
        ema_decay: of an exponential moving average of the weights, inside (0, 1), or None.

    Raises:
        ValueError: a number out of its range, or an unknown schedule.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    max_gradient_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self):
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and above 0, found {self.learning_rate!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and at least 0, found {self.weight_decay!r}")
        if type(self.warmup_steps) is not int or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an integer of at least 0, found {self.warmup_steps!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(map(repr, SCHEDULES))}")
        if self.max_gradient_norm is not None and not (math.isfinite(self.max_gradient_norm) and self.max_gradient_norm > 0):
            raise ValueError(f"max_gradient_norm must be finite and above 0, or None, found {self.max_gradient_norm!r}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, or None, found {self.ema_decay!r}")

    def settings(self) -> dict[str, Any]:
        """By name, as they are recorded."""
        return asdict(self)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a mini-batch.

            lr min(1, (step + 1) / warmup_steps) (1 + cos(pi (step - warmup_steps) / (steps - warmup_steps))) / 2

        without the last factor where the schedule is constant, and during warm-up. It follows from the step alone, so a run that
        goes on needs no state of it.

        Args:
            step: mini-batches done before this one.
            steps: mini-batches of the whole run, all epochs taken.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, steps - self.warmup_steps))) / 2

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Adam, or AdamW where weights decay."""
        if self.weight_decay:
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    def average(self, module: nn.Module) -> AveragedModel | None:
        """The moving average of a module's weights: after the first step those weights, then decay * average + (1 - decay) * weights."""
        return None if self.ema_decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    def clip(self, parameters: Iterable[Tensor]) -> None:
        """Cut the gradients to `max_gradient_norm`."""
        if self.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_gradient_norm)
