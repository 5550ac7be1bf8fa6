"""What a value function is trained on: the objectives and their losses."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

OBJECTIVES = ("td", "td-lambda", "mc", "preference", "reference")


@dataclass(frozen=True)
class Objective:
    """An objective and its settings, checked against each other.

    Args:
        name: one of `OBJECTIVES`; None is "td", or "td-lambda" where `td_lambda` is above 0.
        td_lambda: lambda of `bellman_targets`, for "td-lambda", and for the regression of "preference".
        preference_regression: weight of the regression on the reward in "preference".
        preference_regulariser: weight of `preference_regulariser` in "preference".

    Raises:
        ValueError: an unknown objective, a number out of its range, or one that the objective has no use for.
    """

    name: str | None = None
    td_lambda: float = 0.0
    preference_regression: float = 0.0
    preference_regulariser: float = 0.0

    def __post_init__(self):
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"td_lambda must be between 0 and 1, found {self.td_lambda!r}")
        if self.name is None:
            object.__setattr__(self, "name", "td-lambda" if self.td_lambda else "td")
        if self.name not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.name!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
        for name in ("preference_regression", "preference_regulariser"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be finite and at least 0, found {weight!r}")
            if weight and self.name != "preference":
                raise ValueError(f"{name} is for the objective 'preference', found it with {self.name!r}")
        if self.name == "mc":
            if self.td_lambda not in (0, 1):
                raise ValueError(f"the objective 'mc' is td_lambda=1, found td_lambda={self.td_lambda!r}; for values between use 'td-lambda'")
            object.__setattr__(self, "td_lambda", 1.0)
        if self.name == "td-lambda" and not self.td_lambda:
            raise ValueError("the objective 'td-lambda' needs td_lambda above 0, such as 0.95; with 0 it is 'td'")
        if self.td_lambda and (self.name in ("td", "reference") or (self.name == "preference" and not self.preference_regression)):
            without = " without preference_regression" if self.name == "preference" else ""
            raise ValueError(f"the objective {self.name!r}{without} has no td_lambda, found {self.td_lambda!r}")

    @property
    def pairs(self) -> bool:
        """Whether it learns from pairs of responses rather than from responses."""
        return self.name == "preference"

    @property
    def predicts_reward(self) -> bool:
        """Whether V is a prediction of the reward; else only its differences mean anything, as log-odds of a preference."""
        return not self.pairs or self.preference_regression > 0

    def describe(self) -> str:
        """One line for the provenance."""
        td = f"semi-gradient TD({self.td_lambda:g}), reward at the last token, no discount"
        if self.pairs:
            extra = [f"{self.preference_regression:g} times {td}"] if self.preference_regression else []
            extra += [f"{self.preference_regulariser:g} times the squared gap between generated and chosen responses"] if self.preference_regulariser else []
            return " + ".join(["preference margin -log sigmoid(V(chosen) - V(rejected)) on last tokens", *extra])
        return {
            "td": td,
            "td-lambda": td,
            "mc": "regression of the final reward at every token",
            "reference": "the released code's loss with its mistakes, for comparison only: reward at the first token, no stop-gradient",
        }[str(self.name)]


def bellman_targets(values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> Tensor:
    """Where the value of each state should move, with the stop-gradient.

        target_T = r,    target_t = (1 - lambda) V(s_{t+1}) + lambda target_{t+1}    for t < T

    Time index: state t is the one that was read to sample token t, and T is the last token of the response, the
    end-of-sequence token where there is one. With lambda = 0, the paper's objective, target_t = V(s_{t+1}); with
    lambda = 1 every target is r.

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
    _check_shapes(values, rewards, lengths)
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


def reference_loss(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """The loss of the code that was released with the paper, mistakes and all: for comparison only.

        mean over responses and heads of (V(s_0) - r)^2 + sum over t < T of (V(s_t) - V(s_{t+1}))^2

    Two mistakes. The reward is attached to the first token instead of the last. The target V(s_{t+1}) is not held constant,
    so that its gradient pulls neighbours together. Nothing but the first state hears of the reward, and the smallest loss of
    all is a V that says along the whole response what it said after the prompt: flat, whatever is written.

    Args:
        values: (tokens, num_heads), V(s_t), packed one response after the other.
        rewards: (responses, num_heads), the reward of each response.
        lengths: (responses,), int64, tokens of each response.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: lengths or rewards that do not go with the values.

    Source: the paper's released training script; not the paper.
    """
    _check_shapes(values, rewards, lengths)
    ends = lengths.cumsum(0)
    within = torch.ones(len(values), dtype=torch.bool, device=values.device)
    within[ends - 1] = False
    steps = (values[:-1] - values[1:]).square()[within[:-1]].sum(0)
    first = (values[ends - lengths] - rewards.to(values.dtype)).square().sum(0)
    return (first + steps).mean() / len(lengths)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean over pairs of -log sigmoid(V(chosen) - V(rejected)), the negative log-likelihood of Bradley and Terry's model.

    Args:
        chosen: (pairs,), V at the last token of the response that was preferred.
        rejected: (pairs,), V at the last token of the other one.

    Returns:
        The loss, a scalar; log 2 where V tells nothing.

    Source: Ashrafi et al. 2026 (Pref-CTRL, arXiv 2604.23543), margin loss.
    """
    return -logsigmoid(chosen - rejected).mean()


def preference_regulariser(generated: Tensor, chosen: Tensor) -> Tensor:
    """Mean over pairs of (V(generated) - V(chosen))^2, which keeps the margin from growing without end.

    Args:
        generated: (pairs,), V at the last token of a response of the model itself.
        chosen: (pairs,), V at the last token of the response that was preferred for the same prompt.

    Returns:
        The regulariser, a scalar.

    Source: Ashrafi et al. 2026 (Pref-CTRL, arXiv 2604.23543), regulariser loss.
    """
    return (generated - chosen).square().mean()


def _check_shapes(values: Tensor, rewards: Tensor, lengths: Tensor) -> None:
    if values.dim() != 2 or rewards.shape != (len(lengths), values.shape[-1]) or int(lengths.sum()) != len(values) or (lengths < 1).any():
        raise ValueError(
            f"found values {tuple(values.shape)}, rewards {tuple(rewards.shape)} and lengths from {min(lengths.tolist(), default=0)} "
            f"adding up to {int(lengths.sum())}; "
            "wanted (tokens, heads), (responses, heads) and one length of at least 1 a response, adding up to tokens"
        )
