"""The edit of a batch of states, each row under its own control."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recontrol.ascent.arguments import ROW_OPTIONS
from recontrol.ascent.ascend import ascend
from recontrol.checks import wide_dtype
from recontrol.decoding.control import Control
from recontrol.value import ValueFunction

logger = logging.getLogger("recontrol")


class EditTrace(NamedTuple):
    """What the edits of a batch did.

    Tensors:
        value_before: (rows,), V(h), with several heads their weighted sum.
        value_after: (rows,), V(h + u).
        edit_norm: (rows,), |u|, of the edit as the model reads it.
    """

    value_before: Tensor
    value_after: Tensor
    edit_norm: Tensor


class _Group(NamedTuple):
    """Rows that one ascent serves: they share the value function, the weights of its heads, and which settings are in use."""

    value: ValueFunction
    # (rows,), int64, their places in the batch; None where they are the whole batch, in order.
    rows: Tensor | None
    # Keywords of `ascend`: a number for all rows, or a tensor with one a row.
    settings: dict[str, Any]


class ControlBatch:
    """Edits states, h <- h + u, each row under its own control: one ascent for each group of rows.

    As with `recontrol.ascend`, a row's result does not depend on the other rows. A row stays unedited if its state is not finite, or if its ascent
    would leave the range of its dtype; a warning says so once, when the count is read. No host synchronisation, so an edit can be captured in a CUDA graph.
    """

    def __init__(self, backend: str = "auto"):
        self.backend = backend
        self._controls: Control | list[Control | None] | None = None
        self._groups: list[_Group] = []
        # On the device: rows that were edited, and rows that stayed unedited because of numbers that are not finite.
        self._counts: Tensor | None = None
        self._warned = False

    def assign(self, controls: Control | list[Control | None]) -> None:
        """Set the control of each row, or one for however many rows come; the tensors are kept while the controls stay the same."""
        if self._controls is not None and self._controls == controls:
            return
        self._controls = controls
        places: dict[Any, list[int]] = {}
        listed = [controls] if isinstance(controls, Control) else controls
        for row, control in enumerate(listed):
            if control is not None:
                places.setdefault(_group_key(control), []).append(row)
        self._groups = [_group([listed[row] for row in rows], None if len(rows) == len(listed) else rows) for rows in places.values()]
        if self._groups and self._counts is None:
            # No inference tensor, so that rows can be counted in any mode.
            with torch.inference_mode(False):
                self._counts = torch.zeros(2, dtype=torch.int64, device=self._groups[0].value.device)

    def try_out(self, controls: Iterable[Control], dtype: torch.dtype) -> None:
        """Edit one state of each group: a backend that cannot run says so here, and what it precomputes from the weights is ready."""
        for control in {_group_key(control): control for control in controls}.values():
            group = _group([control], None)
            hidden = torch.zeros(1, group.value.hidden_size, dtype=dtype, device=group.value.device)
            ascend(hidden, group.value, backend=self.backend, **group.settings)

    def edit(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The edited states, (rows, hidden_size); those given are not written to. Rows outside of `mask`, (rows,), stay as they are."""
        return self._edit(states, mask, traced=False)[0]

    def edit_and_trace(self, states: Tensor) -> tuple[Tensor, EditTrace]:
        """The edited states, and what was done to them."""
        return self._edit(states, None, traced=True)

    @property
    def edited_rows(self) -> int:
        """How many rows were edited so far; reading it waits for the device."""
        self.warn()
        return 0 if self._counts is None else int(self._counts[0])

    def warn(self) -> None:
        """Log, once, how many rows stayed unedited; waits for the device."""
        unedited = 0 if self._warned or self._counts is None else int(self._counts[1])
        if unedited:
            self._warned = True
            logger.warning("%d states stay unedited: they, or what the ascent makes of them, are not finite; a smaller step_size may help", unedited)

    def _edit(self, states: Tensor, mask: Tensor | None, *, traced: bool) -> tuple[Tensor, EditTrace]:
        if isinstance(self._controls, list) and states.shape[0] != len(self._controls):
            raise RuntimeError(f"{states.shape[0]} states enter the logits, controls are known for {len(self._controls)}: whose states they are is unknown")
        # No gradient flows through an edit.
        states = states.detach()
        edited, before = states, states.new_zeros(states.shape[0] if traced else 0, dtype=wide_dtype(states.dtype))
        after = before
        for group in self._groups:
            climbed, path = self._climb(group, _rows(states, group), None if mask is None else _rows(mask, group), traced=traced)
            edited = _with_rows(edited, group, climbed)
            if traced:
                # A row that ends early keeps its last value.
                before, after = _with_rows(before, group, path[:, 0]), _with_rows(after, group, path[:, -1])
        norm = (edited.to(after.dtype) - states.to(after.dtype)).norm(dim=-1) if traced else after
        return edited, EditTrace(before, after, norm)

    def _climb(self, group: _Group, states: Tensor, mask: Tensor | None, *, traced: bool) -> tuple[Tensor, Tensor]:
        assert self._counts is not None
        finite = torch.isfinite(states).all(dim=1)
        live = finite if mask is None else mask & finite
        result = ascend(states, group.value, mask=live, return_trace=traced, backend=self.backend, **group.settings)
        climbed, path = result if isinstance(result, tuple) else (result, result)
        finite = torch.isfinite(climbed).all(dim=1)
        edited = (finite if mask is None else mask & finite).sum()
        unedited = (states.shape[0] if mask is None else mask.sum()) - edited
        self._counts.add_(torch.stack([edited, unedited]))
        if traced:
            path = torch.where(finite[:, None], path, path[:, :1])
        return torch.where(finite[:, None], climbed, states), path


def _group_key(control: Control) -> Any:
    return id(control.value), control.head_weights, *(getattr(control, option.name) is None for option in ROW_OPTIONS)


def _group(controls: Sequence[Any], places: list[int] | None) -> _Group:
    value, weights = controls[0].value, controls[0].head_weights
    wide, device = wide_dtype(value.dtype), value.device
    settings: dict[str, Any] = {"head_weights": None if weights is None else torch.tensor(weights, dtype=wide, device=device)}
    for option in ROW_OPTIONS:
        numbers = [getattr(control, option.name) for control in controls]
        dtype = torch.int64 if option.integer else wide
        settings[option.name] = numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, dtype=dtype, device=device)
    return _Group(value, None if places is None else torch.tensor(places, device=device), settings)


def _rows(whole: Tensor, group: _Group) -> Tensor:
    return whole if group.rows is None else whole.index_select(0, group.rows)


def _with_rows(whole: Tensor, group: _Group, part: Tensor) -> Tensor:
    """`whole` with the rows of a group replaced."""
    return part if group.rows is None else whole.index_copy(0, group.rows, part)
