"""Where a step crosses the boundary of the trust region."""

import torch
from torch import Tensor


def fraction_to_radius(move_square: Tensor, edit_dot_move: Tensor, room: Tensor) -> Tensor:
    """The t in [0, 1] with |u + t m| = radius, the positive root of t^2 m.m + 2 t u.m + (u.u - radius^2) = 0.

    Tensors:
        move_square: (rows,), m.m.
        edit_dot_move: (rows,), u.m.
        room: (rows,), radius^2 - u.u, not negative up to rounding.
    """
    root = torch.sqrt(torch.clamp(edit_dot_move * edit_dot_move + move_square * room, min=0))
    # Two forms of the same root: each is used where it does not subtract nearly equal numbers.
    fraction = torch.where(edit_dot_move > 0, room / (edit_dot_move + root), (root - edit_dot_move) / move_square)
    return torch.nan_to_num(fraction, nan=0.0).clamp(0, 1)
