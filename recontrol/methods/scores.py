"""One number a response, by which responses are ordered, where the reward gives several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recontrol.checks import number, several


def one_score(rewards: Tensor, head_weights: Sequence[float] | None) -> Tensor:
    """The weighted sum of a response's rewards, sum_k head_weights[k] * rewards[:, k].

    Args:
        rewards: (responses, num_heads).
        head_weights: one finite number a head; None where there is one head.

    Returns:
        (responses,), float64.

    Raises:
        TypeError: weights that are no numbers.
        ValueError: several heads without weights, weights of another count, or not finite.
    """
    heads = rewards.shape[1]
    if head_weights is None:
        if heads != 1:
            raise ValueError(f"found {heads} rewards a response: give head_weights, {heads} numbers")
        return rewards[:, 0].double()
    weights = [number("head_weights", weight) for weight in several("head_weights", head_weights)]
    if len(weights) != heads:
        raise ValueError(f"head_weights must be {heads} numbers, one a reward, found {len(weights)}")
    return rewards.double() @ torch.tensor(weights, dtype=torch.float64, device=rewards.device)
