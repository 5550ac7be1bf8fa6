"""The settings of a training run."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recontrol.checks import dtype_name, renamed
from recontrol.training.objectives import OBJECTIVES, Objective

KERNELS = ("torch", "closed-form", "triton")
CHOICES = {"schedule": ("constant", "cosine"), "kernel": ("auto", *KERNELS)}
# Names of the release before, in settings and in the entries of a history.
OLD_OBJECTIVES = {"reference": "released"}
OLD_KEYS = {"passes": "epochs", "train_reference_loss": "train_released_loss"}

# What settings must be: a test, its words, and the names.
LIMITS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (lambda given: 0 <= given <= 1, "between 0 and 1", ("td_lambda",)),
    (lambda given: 0 <= given < math.inf, "finite and at least 0", ("preference_regression", "preference_regulariser", "weight_decay")),
    (lambda given: 0 < given < math.inf, "finite and above 0", ("learning_rate",)),
    (lambda given: 0 < given < math.inf, "finite and above 0, or None", ("max_gradient_norm",)),
    (lambda given: 0 < given < 1, "between 0 and 1, or None", ("ema_decay",)),
    (lambda given: 0 <= given < 1, "at least 0 and below 1", ("validation_fraction",)),
    (lambda given: type(given) is int and 0 <= given < 2**63, "an integer of at least 0 and below 2**63", ("warmup_steps", "seed")),
    (lambda given: type(given) is int and given >= 1, "an integer of at least 1", ("batch_size", "epochs", "patience")),
    (lambda given: given in ("float32", "float64"), "float32 or float64, since smaller ones lose Adam's updates", ("dtype",)),
    (lambda given: given == "bfloat16", "bfloat16, or None for that of the weights", ("compute_dtype",)),
)
# Settings that may be None.
OPTIONAL = ("max_gradient_norm", "ema_decay", "batch_size", "patience", "compute_dtype")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of training that decide its result; ValueError for one out of its range, or for which the objective has no use.

    Args:
        objective: "td", the paper's; "td-lambda", with some of the final reward in the targets; "mc", regression of the final reward at
            every token; "preference", which orders pairs of responses to a prompt; or "released", the released code's loss with its
            mistakes, for comparison only. By default "td", or "td-lambda" where td_lambda is above 0.
        td_lambda: share of the final reward in the targets, from 0, the paper's next value only, to 1, "mc". 0.95 needs far fewer epochs on small data.
        preference_regression: for "preference": weight of the TD(lambda) loss, in the unit of the reward, on the model's own responses, else on all.
        preference_regulariser: for "preference": weight of the mean of (V(generated) - V(chosen))^2 on last tokens. Both weights are 1 in Pref-CTRL.
        normalise_rewards: leave V in standard deviations from the mean reward of the training data, both stored in it (`ValueFunction.to_reward`).
        hidden_dims: widths of the hidden layers; 4096 is the paper's "two linear layers".
        learning_rate: of Adam, the largest of the schedule.
        weight_decay: of AdamW; 0 is Adam.
        warmup_steps: mini-batches over which the learning rate rises.
        schedule: of the learning rate after that: "constant", or "cosine", down to 0 at the last of the epochs.
        max_gradient_norm: longer gradients, of the loss in standard deviations of the reward, are cut to this norm.
        ema_decay: keep an exponential moving average of the weights with this decay, such as 0.99, for validation and as the result.
        batch_size: responses ("preference": prompts) in a mini-batch at most; by default a twentieth of those trained on, at least 1 and at most
            the paper's 512. Several processes share it. A mini-batch of `OnlineRollouts` is one of its batches.
        epochs: passes over the training data at most; each pass over `OnlineRollouts` samples new responses.
        patience: stop after so many epochs without a better one; without it training never stops early.
        validation_fraction: share of the prompts held out, at least one prompt; 0 trains on all and keeps the last weights. `OnlineRollouts` hold out none.
        seed: of the first weights, the split and the order of responses.
        dtype: of the weights: "float32" or "float64", or that of torch.
        compute_dtype: "bfloat16" for the products of the hidden layers in training; weights, the optimiser and validation keep their dtype.
        kernel: what computes V and its gradient in training: "torch" is autograd; "closed-form" (two linear layers, one head) and "triton" (fused
            kernels for two linear layers in float32, whose speed on a GPU has not been measured) keep a mask instead of the activations;
            "auto" is "closed-form" on a CPU where it can be and pays, else "torch". They round differently, so a run goes on only with its own.
    """

    objective: str | None = None
    td_lambda: float = 0.0
    preference_regression: float = 0.0
    preference_regulariser: float = 0.0
    normalise_rewards: bool = False
    hidden_dims: Sequence[int] = (4096,)
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_gradient_norm: float | None = None
    ema_decay: float | None = None
    batch_size: int | None = None
    epochs: int = 100
    patience: int | None = 10
    validation_fraction: float = 0.1
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    compute_dtype: Literal["bfloat16"] | None = None
    kernel: Literal["auto", "torch", "closed-form", "triton"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_dims, Sequence) or any(type(width) is not int or width < 1 for width in self.hidden_dims):
            raise ValueError(f"hidden_dims must be a sequence of positive integers such as (4096,), found {self.hidden_dims!r}")
        if self.objective in OLD_OBJECTIVES:
            renamed(f"objective={self.objective!r}", repr(OLD_OBJECTIVES[self.objective]))
        given = {**vars(self), "hidden_dims": tuple(self.hidden_dims), "objective": OLD_OBJECTIVES.get(str(self.objective), self.objective)}
        given |= {name: dtype_name(dtype) for name, dtype in given.items() if isinstance(dtype, torch.dtype)}
        vars(self).update(given, compute_dtype=None if given["compute_dtype"] == given["dtype"] else given["compute_dtype"])
        for name, fits, wanted in ((name, fits, wanted) for fits, wanted, names in LIMITS for name in names):
            given = getattr(self, name)
            if not (given is None and name in OPTIONAL) and not fits(given):
                raise ValueError(f"{name} must be {wanted}, found {given!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}")
        if self.compute_dtype is not None and self.kernel not in ("auto", "torch"):
            raise ValueError(f"compute_dtype is for kernel 'torch', found it with {self.kernel!r}")
        objective = self.new_objective()
        if self.normalise_rewards and not objective.predicts_reward:
            raise ValueError("normalise_rewards has no meaning for the objective 'preference' without preference_regression: V is no prediction of the reward")

    def new_objective(self) -> Objective:
        """The objective with its settings, not yet bound to data."""
        name = self.objective or ("td-lambda" if self.td_lambda else "td")
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
        kind = OBJECTIVES[name]
        for other in sorted({each for others in OBJECTIVES.values() for each in others.takes} - set(kind.takes)):
            if getattr(self, other):
                raise ValueError(f"the objective {name!r} has no {other}, found {getattr(self, other)!r}")
        return kind(**{own: getattr(self, own) for own in kind.takes})

    def record(self) -> dict[str, Any]:
        """By name, as JSON reads it back, with what follows from other settings filled in."""
        objective = self.new_objective()
        own = {name: getattr(objective, name) for name in objective.takes}
        return {**dataclasses.asdict(self), **own, "objective": objective.name, "hidden_dims": list(self.hidden_dims)}


def config_of(config: Any, seed: int | None, settings: Mapping[str, Any]) -> TrainConfig:
    """The config of a call: one that is given or hidden_dims alone, with some settings replaced; TypeError for a setting that there is not."""
    names = [each.name for each in dataclasses.fields(TrainConfig)]
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TypeError(f"train has no setting {', '.join(unknown)}; it has {', '.join(names)}")
    given = dict(settings) if seed is None else {"seed": seed, **settings}
    if isinstance(config, TrainConfig):
        return dataclasses.replace(config, **given)
    return TrainConfig(**(given if config is None else {"hidden_dims": config, **given}))


def in_present_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, or an entry of a history, as this release names them."""
    found = {OLD_KEYS.get(name, name): entry for name, entry in recorded.items()}
    if found.get("objective") in OLD_OBJECTIVES:
        found["objective"] = OLD_OBJECTIVES[found["objective"]]
    return found
