"""The edit of one batch: rows with different controls, climbed together where they share a value function."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.ascend import ascend
from recontrol.decoding.controller import Controller
from recontrol.value import ValueFunction

logger = logging.getLogger("recontrol")


@dataclass(frozen=True)
class _Group:
    """Rows that climb one value function.

    Tensors:
        rows: (rows,), int64, their places in the batch; None where they are the whole batch, in order.
        step_size: (rows,), float32.
        steps: (rows,), int64.
        radius: (rows,), float32, or None where no row has one.
        target: (rows,), float32, or None where no row has one.
        head_weights: (num_heads,), float32, or None for a single head.
    """

    value: ValueFunction
    rows: Tensor | None
    step_size: Tensor
    steps: Tensor
    radius: Tensor | None
    target: Tensor | None
    head_weights: Tensor | None


class BatchEdit:
    """Edits the states of a batch, h <- h + u, each row under its own control: one ascent for each value function.

    Rows with and without a radius, a target or the same weights of heads climb apart, since one ascent has them for all of its rows
    or for none. A row's result depends, to the bit, on its own state and control alone.

    Args:
        controls: one a row, None for a row that stays as it is.
        device: where the states are.
    """

    def __init__(self, controls: Sequence[Controller | None], device: torch.device):
        self.number = len(controls)
        rows: dict[Any, list[int]] = {}
        for row, control in enumerate(controls):
            if control is not None and control.steps > 0:
                key = (id(control.value), control.radius is None, control.target is None, control.head_weights)
                rows.setdefault(key, []).append(row)
        self._groups = [_group([controls[row] for row in places], places, self.number, device) for places in rows.values()]

    def __call__(self, hidden: Tensor) -> Tensor:
        """The edited states; those given are not written to.

        States that are not finite stay as they are: they belong to a request that is lost already, and must not stop the others. So do
        states from which the ascent leaves the range of their dtype, with a warning.

        Args:
            hidden: (rows, hidden_size), floating point.

        Returns:
            (rows, hidden_size), the same dtype; `hidden` itself where no row has a control.

        Raises:
            RuntimeError: there are more or fewer rows than controls.
        """
        if hidden.shape[0] != self.number:
            raise RuntimeError(f"{hidden.shape[0]} states enter the logits, controls are known for {self.number}: it is not known whose states they are")
        edited = hidden
        for group in self._groups:
            states = hidden if group.rows is None else hidden.index_select(0, group.rows)
            climbed = _climb(states, group)
            if group.rows is None:
                return climbed
            edited = hidden.clone() if edited is hidden else edited
            edited.index_copy_(0, group.rows, climbed)
        return edited


def _climb(states: Tensor, group: _Group) -> Tensor:
    finite = torch.isfinite(states).all(dim=1)
    climbed = ascend(
        states,
        group.value,
        group.step_size,
        group.steps,
        mask=finite,
        radius=group.radius,
        target=group.target,
        head_weights=group.head_weights,
    )
    assert isinstance(climbed, Tensor)
    lost = finite & ~torch.isfinite(climbed).all(dim=1)
    if lost.any():
        logger.warning("%d states left the range of %s in the ascent and stay as they were: a smaller step_size is wanted", int(lost.sum()), states.dtype)
        climbed = torch.where(lost[:, None], states, climbed)
    return climbed


def _group(controls: Sequence[Any], places: list[int], number: int, device: torch.device) -> _Group:
    first = controls[0]

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if getattr(first, name) is None else torch.tensor([getattr(control, name) for control in controls], dtype=dtype, device=device)

    step_size, steps = column("step_size"), column("steps", torch.int64)
    assert step_size is not None and steps is not None
    return _Group(
        value=first.value,
        rows=None if len(places) == number else torch.tensor(places, device=device),
        step_size=step_size,
        steps=steps,
        radius=column("radius"),
        target=column("target"),
        head_weights=None if first.head_weights is None else torch.tensor(first.head_weights, device=device),
    )
