"""Where training begins and ends: a V that predicts the mean reward, and back from standard deviations to the unit of the reward."""

from collections.abc import Sequence

import torch

from recontrol.training.data import Standardisation
from recontrol.value import ValueFunction


def initial_value(hidden_size: int, hidden_dims: Sequence[int], num_heads: int, seed: int) -> ValueFunction:
    """A value function that is 0, the mean of standardised rewards, for every state: its last layer is zero.

    Args:
        hidden_size: width of the states.
        hidden_dims: widths of the hidden layers.
        num_heads: rewards that it predicts.
        seed: of the weights of the hidden layers; the caller's generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = ValueFunction(hidden_size, hidden_dims, num_heads)
    weights, biases = value.parameters_by_kind
    torch.nn.init.zeros_(weights[-1])
    torch.nn.init.zeros_(biases[-1])
    return value


@torch.no_grad()
def scale_back(value: ValueFunction, standardisation: Standardisation) -> None:
    """Make V count in the unit of the reward, in place."""
    weights, biases = value.parameters_by_kind
    unit, origin = standardisation.scale.to(weights[-1]), standardisation.mean.to(weights[-1])
    weights[-1].mul_(unit[:, None])
    biases[-1].mul_(unit).add_(origin)
