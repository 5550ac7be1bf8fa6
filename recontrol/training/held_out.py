"""What a value function is judged by on prompts that it was not trained on."""

import math

import torch
from torch import Tensor

from recontrol.training.objectives import preference_loss, td_loss


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

    def merge(self, other: "HeldOutError") -> None:
        """Count what another process has counted.

        Args:
            other: of other responses, with the same `flat`.
        """
        self.tokens += other.tokens
        self.td += other.td
        self.sums += other.sums
        self.least = torch.minimum(self.least, other.least)
        self.most = torch.maximum(self.most, other.most)

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


class HeldOutPreference:
    """Judges V on pairs that it was not trained on: how surprising their order is, and how often V has it right."""

    def __init__(self):
        self.pairs = 0
        self.loss = 0.0
        self.right = 0.0

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Count some pairs.

        Args:
            chosen: (pairs,), V at the last token of the response that was preferred.
            rejected: (pairs,), V at the last token of the other one.
        """
        if len(chosen):
            self.pairs += len(chosen)
            self.loss += float(preference_loss(chosen.double(), rejected.double())) * len(chosen)
            # A V that tells nothing is right half of the time.
            self.right += float((chosen > rejected).double().sum() + (chosen == rejected).double().sum() / 2)

    def merge(self, other: "HeldOutPreference") -> None:
        """Count what another process has counted.

        Args:
            other: of other pairs.
        """
        self.pairs += other.pairs
        self.loss += other.loss
        self.right += other.right

    def summary(self) -> dict[str, float | None]:
        """The scores so far, means over pairs.

        Returns:
            validation_preference_loss, nats, log 2 for a V that tells nothing; validation_preference_accuracy, 1/2 for it.
        """
        return {"validation_preference_loss": self.loss / self.pairs, "validation_preference_accuracy": self.right / self.pairs}


def _finite(number: Tensor) -> float | None:
    return float(number) if math.isfinite(number) else None
