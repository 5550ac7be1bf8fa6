"""The oracle: gradient ascent on a value function by autograd, one step after another, in any precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recontrol.ambient import shielded
from recontrol.ascent.arguments import AscentArguments, normalise
from recontrol.checks import wide_dtype
from recontrol.value import ValueFunction

__all__ = ["ascend"]


def ascend(
    hidden: Tensor,
    value: ValueFunction,
    step_size: float | Tensor = 0.5,
    steps: int | Tensor = 30,
    *,
    mask: Tensor | None = None,
    radius: float | Tensor | None = None,
    target: float | Tensor | None = None,
    head_weights: Tensor | None = None,
    return_trace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Climb V from each hidden state by plain gradient steps, u <- u + alpha * grad V(h + u), from u = 0: the oracle of `recontrol.ascend`.

    Args:
        hidden: (rows, hidden_size), floating point; this and what follows is as in `recontrol.ascend`.
        value: the value function.
        step_size: alpha, a float or (rows,).
        steps: n, an int or (rows,).
        mask: (rows,), bool.
        radius: a float or (rows,).
        target: a float or (rows,).
        head_weights: (num_heads,).
        return_trace: also return V along the path, in the compute dtype.
        dtype: compute in this precision; by default float64 for float64 input, else float32.
    """
    arguments = normalise(hidden, value, step_size, steps, mask, radius, target, head_weights)
    arguments.check()
    edited, trace = ascend_loop(arguments, *value.parameters_by_kind, dtype or wide_dtype(hidden.dtype))
    return (edited, trace) if return_trace else edited


@shielded()
def ascend_loop(arguments: AscentArguments, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The edited states and the trace of V by autograd in this dtype; on clones, since tensors of inference_mode cannot take part in autograd."""
    weights = [weight.detach().clone().to(dtype) for weight in weights]
    biases = [bias.detach().clone().to(dtype) for bias in biases]
    start = arguments.hidden.detach().clone().to(dtype)
    step_size, head_weights = arguments.step_size.to(dtype), arguments.head_weights.clone().to(dtype)
    live_steps, most = arguments.live_steps(), arguments.most_steps()
    edit = torch.zeros_like(start)
    stopped = torch.zeros_like(live_steps, dtype=torch.bool)
    trace = start.new_empty(start.shape[0], most + 1)

    def objective(states: Tensor) -> Tensor:
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            states = torch.relu(states @ weight.T + bias)
        return (states @ weights[-1].T + biases[-1]) @ head_weights

    for step in range(most + 1):
        state = (start + edit).requires_grad_()
        with torch.enable_grad():
            values = objective(state)
            (gradient,) = torch.autograd.grad(values.sum(), state)
        values = values.detach()
        trace[:, step] = values
        scale = step_size if arguments.target is None else 2 * step_size * (arguments.target.to(dtype) - values)
        move = scale[:, None] * gradient
        live = (step < live_steps) & ~stopped
        if arguments.radius is not None:
            radius = arguments.radius.to(dtype)
            leaves = live & ((edit + move).norm(dim=1) > radius)
            room = radius * radius - (edit * edit).sum(1)
            fraction = fraction_to_radius((move * move).sum(1), (edit * move).sum(1), room)
            move = torch.where(leaves[:, None], fraction[:, None] * move, move)
            stopped = stopped | leaves
        edit = torch.where(live[:, None], edit + move, edit)
    edited = (start + edit).to(arguments.hidden.dtype)
    return torch.where((live_steps > 0)[:, None], edited, arguments.hidden), trace


def fraction_to_radius(move_square: Tensor, edit_dot_move: Tensor, room: Tensor) -> Tensor:
    """The t in [0, 1] with |u + t m| = radius, where t^2 m.m + 2 t u.m = room = radius^2 - u.u: all (rows,)."""
    root = torch.sqrt(torch.clamp(edit_dot_move * edit_dot_move + move_square * room, min=0))
    # Two forms of the same root: each is used where it does not subtract nearly equal numbers.
    fraction = torch.where(edit_dot_move > 0, room / (edit_dot_move + root), (root - edit_dot_move) / move_square)
    return torch.nan_to_num(fraction, nan=0.0).clamp(0, 1)
