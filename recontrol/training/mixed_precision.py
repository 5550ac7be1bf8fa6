"""V with its hidden layers computed in a dtype of fewer bits than its weights have."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from recontrol.value import ValueFunction


def low_precision_values(value: ValueFunction, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """V of hidden states: products of the hidden layers in `dtype`, accumulated as the device does it; weights and gradients stay as they are.

    The last layer is computed in the dtype of the weights: a TD error is the difference of two values close together, and would
    drown in the rounding of theirs.

    Args:
        value: the value function.
        hidden: (..., hidden_size), floating point.
        dtype: of the products, torch.bfloat16.

    Returns:
        (..., num_heads), dtype of the weights.
    """
    weights, biases = value.parameters_by_kind
    activations = hidden.to(dtype)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        activations = torch.relu(linear(activations, weight.to(dtype), bias.to(dtype)))
    return linear(activations.to(value.dtype), weights[-1], biases[-1])
