"""The loss of the code that was released with the paper, for comparison only."""

import torch
from torch import Tensor

from recontrol.training.objectives.tokens import TokenObjective, check_shapes


def released_loss(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """The released code's loss, mistakes and all.

        mean over responses and heads of (V(s_0) - r)^2 + sum over t < T of (V(s_t) - V(s_{t+1}))^2

    Two mistakes. The reward is attached to the first token instead of the last. The target V(s_{t+1}) is not held constant, so that
    its gradient pulls neighbours together. Only the first state sees the reward, and the smallest loss of all has a V that is flat
    along each response, whatever is written.

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
    check_shapes(values, rewards, lengths)
    ends = lengths.cumsum(0)
    within = torch.ones(len(values), dtype=torch.bool, device=values.device)
    within[ends - 1] = False
    steps = (values[:-1] - values[1:]).square()[within[:-1]].sum(0)
    first = (values[ends - lengths] - rewards.to(values.dtype)).square().sum(0)
    return (first + steps).mean() / len(lengths)


class Released(TokenObjective):
    """`released_loss`, a mean over responses."""

    name, loss_name = "released", "train_released_loss"

    def describe(self) -> str:
        """As `Objective.describe`."""
        return "the released code's loss with its mistakes, for comparison only: reward at the first token, no stop-gradient"

    def loss(self, values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
        """See `released_loss`."""
        return released_loss(values, rewards, lengths)

    def terms(self, lengths: Tensor) -> int:
        """Responses."""
        return len(lengths)
