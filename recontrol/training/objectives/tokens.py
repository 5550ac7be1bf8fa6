"""What an objective is, and those on the tokens of single responses: TD, TD(lambda) and Monte Carlo, and the loss of the released code."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from recontrol.training.data import Standardisation, TrainingData, read

# V of packed hidden states, (tokens, hidden_size) -> (tokens, num_heads).
Values = Callable[[Tensor], Tensor]
# By name; subclasses of `Objective` enter themselves.
OBJECTIVES: dict[str, type["Objective"]] = {}


class Objective:
    """A loss, a score on what is held out, and the settings that they take; first checked, then bound to data. One with a name can be asked for."""

    name: ClassVar[str] = ""
    # Of its loss in the history.
    loss_name: ClassVar[str] = "train_loss"
    # The fields of `TrainConfig` that are its own; its instances have them as attributes.
    takes: ClassVar[tuple[str, ...]] = ()
    td_lambda: float = 0.0
    # Whether it can learn from one batch of responses after the other, without seeing them all first.
    online: ClassVar[bool] = True
    # Whether V predicts the reward; else only its differences mean anything.
    predicts_reward: bool = True
    # One line for the provenance, in which {0.td_lambda:g} is a setting.
    description: str = ""
    # What it is bound to, the unit in which it counts rewards, and what of the data, beside lengths, rewards and prompts, decides the result.
    data: TrainingData
    standardisation: Standardisation
    labels: tuple[Tensor, ...] = ()
    # What mini-batches are made of: responses, prompts, or batches.
    units: Tensor

    def __init_subclass__(cls) -> None:
        if cls.name:
            OBJECTIVES[cls.name] = cls

    def __init__(self, **settings: Any):
        vars(self).update(settings)
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""

    def bind(self, data: TrainingData) -> None:
        """Find in the data what it learns from."""
        self.data, self.standardisation, self.units = data, Standardisation.of(data.rewards), data.held_in

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """Add this process's share of the gradient of a mini-batch: its sum of the loss in the unit of the reward, and the count of all processes."""
        raise NotImplementedError

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """The scores on what is held out; empty if nothing is."""
        raise NotImplementedError

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """What the best epoch has most of: minus the Monte Carlo error, each head's in units of its flat error where defined; None without validation."""
        error, explained = entry.get("validation_mc_error"), entry.get("validation_explained_variance")
        return explained if error is None or explained is not None else -error

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """Warnings about the best epoch."""
        explained = entry.get("validation_explained_variance")
        if explained is None or explained > 0:
            return []
        found = f"on prompts held out the value function predicts rewards no better than their mean (explained variance {explained:.3g})"
        return [f"{found}: it needs more rollouts, or a reward that depends on the response"]


def bellman_targets(values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> Tensor:
    """target_T = r,  target_t = (1 - lambda) V(s_{t+1}) + lambda target_{t+1} for t < T, with the stop-gradient: (tokens, num_heads); arguments of `td_loss`.

    State t was read to sample token t, and T is the last token of the response, the end-of-sequence token where there is one. Lambda 0 is the paper's
    objective; with lambda 1 every target is r. Source: Kong et al. 2024, section 4.2; Sutton 1988 (TD(lambda)).
    """
    check_shapes(values, rewards, lengths)
    if td_lambda == 1:
        return rewards.to(values.dtype).repeat_interleave(lengths, dim=0)
    values = values.detach()
    last = lengths.cumsum(0) - 1
    # The rows that this takes from the next response are the last ones, which get the reward.
    targets = values.roll(-1, dims=0)
    targets[last] = rewards.to(values.dtype)
    if td_lambda:
        # From the last token but one to the first, all responses at once.
        for back in range(1, int(lengths.max())):
            rows = last[lengths > back] - back
            targets[rows] = (1 - td_lambda) * values[rows + 1] + td_lambda * targets[rows + 1]
    return targets


def td_loss(values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> Tensor:
    """Mean over tokens and heads of (V(s_t) - target_t)^2; its gradient is the semi-gradient, since targets are constants (Kong et al. 2024, section 4.2).

    values: (tokens, num_heads), V(s_t), packed one response after the other; rewards: (responses, num_heads); lengths: (responses,), int64.
    """
    return (values - bellman_targets(values, rewards, lengths, td_lambda)).square().mean()


def released_loss(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """The paper's released script: mean over responses and heads of (V(s_0) - r)^2 + sum over t < T of (V(s_t) - V(s_{t+1}))^2; arguments of `td_loss`.

    Two mistakes: the reward is attached to the first token instead of the last, and the target V(s_{t+1}) is not held constant, so that its gradient
    pulls neighbours together. The smallest loss of all has a V that is flat along each response, whatever is written.
    """
    check_shapes(values, rewards, lengths)
    ends = lengths.cumsum(0)
    within = torch.ones(len(values), dtype=torch.bool, device=values.device)
    within[ends - 1] = False
    steps = (values[:-1] - values[1:]).square()[within[:-1]].sum(0)
    first = (values[ends - lengths] - rewards.to(values.dtype)).square().sum(0)
    return (first + steps).mean() / len(lengths)


def check_shapes(values: Tensor, rewards: Tensor, lengths: Tensor) -> None:
    """Refuse lengths or rewards that do not go with packed values."""
    total, shortest = int(lengths.sum()), min(lengths.tolist(), default=0)
    if values.dim() != 2 or rewards.shape != (len(lengths), values.shape[-1]) or total != len(values) or (len(lengths) and shortest < 1):
        found = f"values {tuple(values.shape)}, rewards {tuple(rewards.shape)} and lengths from {shortest} adding up to {total}"
        raise ValueError(f"found {found}; wanted (tokens, heads), (responses, heads) and one length of at least 1 a response, adding up to tokens")


def held_out_scores(values: Tensor, rewards: Tensor, lengths: Tensor, flat: Tensor, td_lambda: float = 0.0) -> dict[str, float | None]:
    """TD and MC error, 1 minus the MC error over that of a V that is `flat`, (num_heads,), and the correlation, None where something does not vary.

    The MC error, the mean of (V(s_t) - r)^2, is a proper score. The TD error is not: along a response the squared increments of the true V add up to
    Var(r) - Var(V(s_0)) on average, those of a flat V to Var(r), so that it is nearly as small for a V that has learned nothing.
    """
    # In the dtype of the values, in which training that diverges shows.
    td = td_loss(values.detach(), rewards, lengths, td_lambda)
    v, r = (tensor.detach().double() - flat.double() for tensor in (values, rewards))
    r = r.repeat_interleave(lengths, dim=0)
    error = (v - r).square().mean(0)
    explained = 1 - error / r.square().mean(0)
    # Whether they vary does not follow from their variance, which for equal numbers may be rounding.
    vary = (v != v[0]).any(0) & (r != r[0]).any(0)
    v, r = v - v.mean(0), r - r.mean(0)
    correlation = torch.where(vary, (v * r).sum(0) / (v.square().sum(0) * r.square().sum(0)).sqrt(), math.nan)
    scores = {"validation_td_loss": float(td), "validation_mc_error": float(error.mean())}
    defined = {"validation_explained_variance": float(explained.mean()), "validation_correlation": float(correlation.mean())}
    return {**scores, **{name: score if math.isfinite(score) else None for name, score in defined.items()}}


@torch.no_grad()
def held_out_error(values_of: Values, data: TrainingData, responses: Tensor, standardisation: Standardisation, td_lambda: float) -> dict[str, float | None]:
    """`held_out_scores` of some responses, read by all processes; empty if there are none."""
    if not len(responses):
        return {}
    own = data.processes.share(responses)
    values = [standardisation.undo(values_of(states)).cpu() for states, _, _ in read(data.rollouts, own, standardisation)]
    shares = data.processes.gathered((own, values))
    order, every = torch.cat([indices for indices, _ in shares]), torch.cat([part for _, parts in shares for part in parts])
    return held_out_scores(every, data.rollouts.rewards[order], data.rollouts.lengths[order], standardisation.mean, td_lambda)


class TokenObjective(Objective):
    """A mean over tokens, or responses, validated by `held_out_scores`."""

    loss_name = "train_td_loss"
    description = "semi-gradient TD({0.td_lambda:g}), reward at the last token, no discount"
    over_responses = False

    def loss(self, values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
        """The mean of its terms over some responses; see `td_loss`."""
        return td_loss(values, rewards, lengths, self.td_lambda)

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Objective.backward`."""
        rollouts, responses = self.data.fetch(batch)
        total, sum_of_losses = len(responses) if self.over_responses else int(rollouts.lengths[responses].sum()), 0.0
        for states, rewards, lengths in read(rollouts, self.data.processes.share(responses), self.standardisation):
            values = values_of(states)
            count = len(lengths if self.over_responses else values)
            rewards, lengths = rewards.to(values.device), lengths.to(values.device)
            (self.loss(values, rewards, lengths) * (count / total)).backward()
            unit = self.standardisation.scale.to(values)
            sum_of_losses += float(self.loss(values.detach() * unit, rewards * unit, lengths)) * count
        # A batch of which stop strings left nothing has no terms.
        return sum_of_losses, max(1, total)

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Objective.validate`."""
        return held_out_error(values_of, self.data, self.data.held_out, self.standardisation, self.td_lambda)


class TD(TokenObjective):
    """The paper's objective: the target of a state is the value of the next one."""

    name = "td"


class TDLambda(TokenObjective):
    """With some of the final reward in every target."""

    name, takes = "td-lambda", ("td_lambda",)

    def check(self) -> None:
        """As `Objective.check`."""
        if not self.td_lambda:
            raise ValueError("the objective 'td-lambda' needs td_lambda above 0, such as 0.95; with 0 it is 'td'")


class MonteCarlo(TokenObjective):
    """Regression of the final reward at every token: TD(1)."""

    name, takes, description = "mc", ("td_lambda",), "regression of the final reward at every token"

    def check(self) -> None:
        """As `Objective.check`."""
        if self.td_lambda not in (0, 1):
            raise ValueError(f"the objective 'mc' is td_lambda=1, found td_lambda={self.td_lambda!r}; for values between use 'td-lambda'")
        self.td_lambda = 1.0


class Released(TokenObjective):
    """`released_loss`, for comparison only."""

    name, loss_name, over_responses = "released", "train_released_loss", True
    description = "the released code's loss with its mistakes, for comparison only: reward at the first token, no stop-gradient"

    def loss(self, values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
        """See `released_loss`."""
        return released_loss(values, rewards, lengths)
