"""The objectives on the tokens of single responses: TD, TD(lambda) and Monte Carlo."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recontrol.training.data import Standardisation, TrainingData, read
from recontrol.training.objectives.base import Objective, Values


def bellman_targets(values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> Tensor:
    """Where the value of each state should move, with the stop-gradient.

        target_T = r,    target_t = (1 - lambda) V(s_{t+1}) + lambda target_{t+1}    for t < T

    Time index: state t was read to sample token t, and T is the last token of the response, the end-of-sequence token where there
    is one. With lambda = 0, the paper's objective, target_t = V(s_{t+1}); with lambda = 1 every target is r.

    Args:
        values: (tokens, num_heads), V(s_t), packed one response after the other; no gradient flows into the targets.
        rewards: (responses, num_heads), the reward of each response.
        lengths: (responses,), int64, tokens of each response, at least 1 each, adding up to `tokens`.
        td_lambda: lambda, between 0 (the next value) and 1 (the final reward).

    Returns:
        (tokens, num_heads), dtype of `values`.

    Raises:
        ValueError: lengths or rewards that do not go with the values.

    Source: Kong et al. 2024, section 4.2 (lambda = 0); Sutton 1988 (TD(lambda)).
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
    """Mean over tokens and heads of (V(s_t) - target_t)^2; its gradient is the semi-gradient, since targets are constants.

    Args:
        values: (tokens, num_heads), V(s_t), packed one response after the other.
        rewards: (responses, num_heads), the reward of each response.
        lengths: (responses,), int64, tokens of each response.
        td_lambda: lambda of `bellman_targets`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: lengths or rewards that do not go with the values.

    Source: Kong et al. 2024, section 4.2.
    """
    return (values - bellman_targets(values, rewards, lengths, td_lambda)).square().mean()


def check_shapes(values: Tensor, rewards: Tensor, lengths: Tensor) -> None:
    """Refuse lengths or rewards that do not go with packed values."""
    if values.dim() != 2 or rewards.shape != (len(lengths), values.shape[-1]) or int(lengths.sum()) != len(values) or (lengths < 1).any():
        raise ValueError(
            f"found values {tuple(values.shape)}, rewards {tuple(rewards.shape)} and lengths from {min(lengths.tolist(), default=0)} "
            f"adding up to {int(lengths.sum())}; "
            "wanted (tokens, heads), (responses, heads) and one length of at least 1 a response, adding up to tokens"
        )


class HeldOutError:
    """Judges V on responses that it was not trained on, a few at a time; every token counts the same.

    The Monte Carlo error, the mean of (V(s_t) - r)^2, is a proper score: it is the part of r that no function of s_t can know plus the
    squared distance of V from the true value function. The TD error is not: along a response the increments of the true V are
    uncorrelated and their squares add up to Var(r) - Var(V(s_0)) on average, those of a flat V to Var(r), so that it is nearly as
    small for a V that has learned nothing.

    Args:
        num_heads: how many rewards a response has.
        flat: (num_heads,), the mean reward of the training data: the prediction of a V that has learned nothing.
    """

    def __init__(self, num_heads: int, flat: Tensor):
        self.flat = flat.double()
        self.tokens = 0
        self.td = 0.0
        # Rows: v, r, v^2, r^2, v r, (v - r)^2, each a sum over tokens of deviations from `flat`.
        self.sums = torch.zeros(6, num_heads, dtype=torch.float64)
        # Rows: v, r. Whether they vary does not follow from the sums, whose rounding looks like variance.
        self.least = torch.full((2, num_heads), math.inf, dtype=torch.float64)
        self.most = -self.least

    def add(self, values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> None:
        """Count some responses; the arguments are those of `td_loss`."""
        values = values.detach()
        self.tokens += len(values)
        self.td += float(td_loss(values, rewards, lengths, td_lambda)) * len(values)
        v = values.cpu().double() - self.flat
        r = rewards.cpu().double().repeat_interleave(lengths.cpu(), dim=0) - self.flat
        self.sums += torch.stack([v.sum(0), r.sum(0), (v * v).sum(0), (r * r).sum(0), (v * r).sum(0), (v - r).square().sum(0)])
        self.least = torch.minimum(self.least, torch.stack([v.amin(0), r.amin(0)]))
        self.most = torch.maximum(self.most, torch.stack([v.amax(0), r.amax(0)]))

    def merge(self, other: "HeldOutError") -> None:
        """Count what another process has counted, with the same `flat`."""
        self.tokens += other.tokens
        self.td += other.td
        self.sums += other.sums
        self.least = torch.minimum(self.least, other.least)
        self.most = torch.maximum(self.most, other.most)

    def summary(self) -> dict[str, float | None]:
        """The scores, means over tokens and heads: two errors in squared reward, 1 minus the MC error over that of the flat V, and a correlation.

        The last two are None where all rewards, or all values, are the same.
        """
        v, r, vv, rr, vr, error = self.sums / self.tokens
        explained = 1 - error / rr
        correlation = (vr - v * r) / ((vv - v * v).clamp(min=0) * (rr - r * r).clamp(min=0)).sqrt()
        correlation[(self.least == self.most).any(0)] = math.nan
        return {
            "validation_td_loss": self.td / self.tokens,
            "validation_mc_error": float(error.mean()),
            "validation_explained_variance": _finite(explained.mean()),
            "validation_correlation": _finite(correlation.mean()),
        }


def _finite(number: Tensor) -> float | None:
    return float(number) if math.isfinite(number) else None


@torch.no_grad()
def held_out_error(values_of: Values, data: TrainingData, responses: Tensor, standardisation: Standardisation, td_lambda: float) -> dict[str, float | None]:
    """The summary of `HeldOutError` on some responses, in the unit of the reward."""
    error = HeldOutError(data.rollouts.num_heads, standardisation.mean)
    for states, rewards, lengths in read(data.rollouts, data.processes.share(responses), standardisation):
        values = values_of(states)
        error.add(standardisation.undo(values), standardisation.undo(rewards.to(values)), lengths.to(values.device), td_lambda)
    return data.processes.merged(error).summary()


class TokenObjective(Objective):
    """A mean over tokens, validated by `HeldOutError`."""

    loss_name = "train_td_loss"
    td_lambda: float = 0.0

    def describe(self) -> str:
        """As `Objective.describe`."""
        return f"semi-gradient TD({self.td_lambda:g}), reward at the last token, no discount"

    def bind(self, data: TrainingData) -> None:
        """As `Objective.bind`."""
        self.data, self.standardisation = data, Standardisation.of(data.rewards)

    def units(self, epoch: int) -> Tensor:
        """As `Objective.units`: responses, or batches of them."""
        return self.data.units(epoch)

    def loss(self, values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
        """The mean of its terms over some responses; see `td_loss`."""
        return td_loss(values, rewards, lengths, self.td_lambda)

    def terms(self, lengths: Tensor) -> int:
        """How many terms that mean has."""
        return int(lengths.sum())

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Objective.backward`."""
        rollouts, responses = self.data.fetch(batch)
        total = self.terms(rollouts.lengths[responses])
        sum_of_losses = 0.0
        for states, rewards, lengths in read(rollouts, self.data.processes.share(responses), self.standardisation):
            values, count = values_of(states), self.terms(lengths)
            rewards, lengths = rewards.to(values.device), lengths.to(values.device)
            (self.loss(values, rewards, lengths) * (count / total)).backward()
            unit = self.standardisation.scale.to(values)
            sum_of_losses += float(self.loss(values.detach() * unit, rewards * unit, lengths)) * count
        # A batch of which stop strings left nothing has no terms.
        return sum_of_losses, max(1, total)

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Objective.validate`: the scores of `HeldOutError`."""
        if not len(self.data.held_out):
            return {}
        return held_out_error(values_of, self.data, self.data.held_out, self.standardisation, self.td_lambda)

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """Minus the Monte Carlo error, each head's in units of its flat error where that is defined."""
        if "validation_mc_error" not in entry:
            return None
        explained = entry["validation_explained_variance"]
        return -entry["validation_mc_error"] if explained is None else explained

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """As `Objective.doubts`."""
        return doubts_about_prediction(entry)


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

    name, takes = "mc", ("td_lambda",)

    def check(self) -> None:
        """As `Objective.check`."""
        if self.td_lambda not in (0, 1):
            raise ValueError(f"the objective 'mc' is td_lambda=1, found td_lambda={self.td_lambda!r}; for values between use 'td-lambda'")
        self.td_lambda = 1.0

    def describe(self) -> str:
        """As `Objective.describe`."""
        return "regression of the final reward at every token"


def doubts_about_prediction(entry: Mapping[str, Any]) -> list[str]:
    """A warning where V predicts no better than the mean reward."""
    explained = entry.get("validation_explained_variance")
    if explained is None or explained > 0:
        return []
    return [
        f"on prompts held out the value function predicts rewards no better than their mean (explained variance {explained:.3g}): "
        "it needs more rollouts, or a reward that depends on the response"
    ]
