"""How many bytes an ascent must move, counted for the actual input, and how often units flip on the way."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from recontrol import ValueFunction


@dataclass(frozen=True)
class Traffic:
    """What moves in one ascent of a batch; a row of a matrix that several hidden states need counts once.

    Args:
        bytes_moved: two layers: all of W1, the rows of W1 and of G of units active at the start, and the rows of both of units
            that flip. Three layers: the matrices fit no cache, so each step also counts the rows of W2^T of active units, the
            rows of W2 of flipped units of the second layer, and the rows of G of active units (of flipped ones alone where
            the second layer is unchanged).
        bytes_once: the bytes that are touched at all, each counted once: nothing that starts with cold caches can move less. It is
            lower than `bytes_moved` because the active rows of W1 may still be in cache from the first pass over them.
        flips_per_step: units that change sign, mean over hidden states and over the steps that are followed by another.
    """

    bytes_moved: int
    bytes_once: int
    flips_per_step: float


@torch.no_grad()
def traffic(hidden: Tensor, value: ValueFunction, step_size: float, steps: int) -> Traffic:
    """Follow the path of `hidden`, (rows, hidden_size), by dense steps, and count. `steps` is at least 1."""
    count = _three_layers if len(value.layers) == 3 else _two_layers
    return count(hidden, value, step_size, steps)


def _two_layers(hidden: Tensor, value: ValueFunction, step_size: float, steps: int) -> Traffic:
    (first, (out,)), (first_bias, _) = value.parameters_by_kind
    gram, (units, width) = value.prepared().gram, first.shape
    z = linear(hidden, first, first_bias)
    on = z > 0
    active, flipped, flips = on.any(0), torch.zeros(units, dtype=torch.bool, device=z.device), 0
    for _ in range(steps - 1):
        z = z + step_size * torch.where(on, out, 0) @ gram
        turned = on ^ (z > 0)
        on = z > 0
        flipped |= turned.any(0)
        flips += int(turned.sum())
    picked = int(active.sum()) + int(flipped.sum())
    once = int((active | flipped).sum())
    size = z.element_size()
    moved = size * (units * width + picked * (width + units))
    return Traffic(moved, size * (units * width + once * units), flips / (hidden.shape[0] * max(1, steps - 1)))


def _three_layers(hidden: Tensor, value: ValueFunction, step_size: float, steps: int) -> Traffic:
    (first, second, (out,)), (first_bias, second_bias, _) = value.parameters_by_kind
    gram, (units1, width), units2 = value.prepared().gram, first.shape, second.shape[0]
    z1 = linear(hidden, first, first_bias)
    on1, on2 = z1 > 0, linear(torch.relu(z1), second, second_bias) > 0
    ever = on1.any(0)
    ever2 = on2.any(0)
    elements = units1 * width + int(ever.sum()) * (units2 + units1) + int(ever2.sum()) * units1
    flips = 0
    for _ in range(steps - 1):
        z1 = z1 + step_size * (torch.where(on1, torch.where(on2, out, 0) @ second, 0) @ gram)
        now1 = z1 > 0
        now2 = linear(torch.relu(z1), second, second_bias) > 0
        turned1, turned2 = on1 ^ now1, on2 ^ now2
        dense = turned2.any(1, keepdim=True)
        elements += int((on1 | now1).any(0).sum()) * units2 + int(turned2.any(0).sum()) * units1
        elements += int(torch.where(dense, now1, turned1).any(0).sum()) * units1
        flips += int(turned1.sum()) + int(turned2.sum())
        on1, on2 = now1, now2
        ever |= on1.any(0)
        ever2 |= on2.any(0)
    once = units1 * width + int(ever.sum()) * units1 + units2 * int(ever.sum())
    size = z1.element_size()
    moved = size * (elements + int(ever.sum()) * width)
    return Traffic(moved, size * once, flips / (hidden.shape[0] * max(1, steps - 1)))
