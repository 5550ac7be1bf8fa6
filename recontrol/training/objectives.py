"""What a value function is trained on, its temporal-difference loss, and what it is judged by on responses held out."""

import math

import torch
from torch import Tensor


def bellman_targets(values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> Tensor:
    """Where the value of each state should move, with the stop-gradient.

        target_T = r,    target_t = (1 - lambda) V(s_{t+1}) + lambda target_{t+1}    for t < T

    Time index: state t is the one that was read to sample token t, and T is the last token of the response, the
    end-of-sequence token where there is one. With lambda = 0, the paper's objective, target_t = V(s_{t+1}).

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
    if values.dim() != 2 or rewards.shape != (len(lengths), values.shape[-1]) or int(lengths.sum()) != len(values) or (lengths < 1).any():
        raise ValueError(
            f"found values {tuple(values.shape)}, rewards {tuple(rewards.shape)} and lengths from {min(lengths.tolist(), default=0)} "
            f"adding up to {int(lengths.sum())}; "
            "wanted (tokens, heads), (responses, heads) and one length of at least 1 a response, adding up to tokens"
        )
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


class HeldOutError:
    """Judges V on responses that it was not trained on, a few at a time; every token counts the same.

    The Monte Carlo error, the mean of (V(s_t) - r)^2, is a proper score: it is the part of r that no function of s_t
    can know plus the squared distance of V from the true value function. The TD error is not: along a response the
    increments of the true V are uncorrelated and their squares add up to Var(r) - Var(V(s_0)) on average, those of a flat V to
    Var(r), so that hardly anything tells the best V from one that has learned nothing.

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
        # Rows: v, r. Whether they vary cannot be told from the sums, whose rounding looks like variance.
        self.least = torch.full((2, num_heads), math.inf, dtype=torch.float64)
        self.most = -self.least

    def add(self, values: Tensor, rewards: Tensor, lengths: Tensor, td_lambda: float = 0.0) -> None:
        """Count some responses.

        Args:
            values: (tokens, num_heads), V(s_t), packed one response after the other.
            rewards: (responses, num_heads), the reward of each response.
            lengths: (responses,), int64, tokens of each response.
            td_lambda: lambda of `bellman_targets`.
        """
        values = values.detach()
        self.tokens += len(values)
        self.td += float(td_loss(values, rewards, lengths, td_lambda)) * len(values)
        v = values.cpu().double() - self.flat
        r = rewards.cpu().double().repeat_interleave(lengths.cpu(), dim=0) - self.flat
        self.sums += torch.stack([v.sum(0), r.sum(0), (v * v).sum(0), (r * r).sum(0), (v * r).sum(0), (v - r).square().sum(0)])
        self.least = torch.minimum(self.least, torch.stack([v.amin(0), r.amin(0)]))
        self.most = torch.maximum(self.most, torch.stack([v.amax(0), r.amax(0)]))

    def summary(self) -> dict[str, float | None]:
        """The scores so far, means over tokens and heads.

        Returns:
            validation_td_loss, squared reward; validation_mc_error, squared reward; validation_explained_variance, 1 minus
            that error over the error of the flat V; validation_correlation of V(s_t) with the reward. The last two are
            None where they are not defined, because all rewards, or all values, are the same.
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
