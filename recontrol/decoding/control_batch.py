"""The edit of a batch of states, each row under its own control."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recontrol.ambient import is_traced
from recontrol.ascent.arguments import ROW_OPTIONS
from recontrol.ascent.ascend import ascend
from recontrol.checks import wide_dtype
from recontrol.decoding.control import Control
from recontrol.value import ValueFunction

logger = logging.getLogger("recontrol")


class EditTrace(NamedTuple):
    """What the edits of a batch did: (rows,) of V(h), with several heads their weighted sum, of V(h + u), and of |u| as the model reads it."""

    value_before: Tensor
    value_after: Tensor
    edit_norm: Tensor


class _Group(NamedTuple):
    """Rows that one ascent serves: their value function, places in the batch (None: all of it, in order), and the keywords of `ascend`."""

    value: ValueFunction
    rows: Tensor | None
    settings: dict[str, Any]


class ControlBatch:
    """Edits states, each row under its own control, without host synchronisation; a row stays unedited, and is warned of, where it would not be finite."""

    def __init__(self, backend: str = "auto"):
        self.backend = backend
        self._controls: Control | list[Control | None] | None = None
        self._groups: list[_Group] = []
        # On the device: rows that were edited, and rows that stayed unedited because of numbers that are not finite.
        self._counts: Any = None
        # Edited rows that were counted without the device.
        self._counted = 0
        self._warned = False

    def assign(self, controls: Control | list[Control | None]) -> None:
        """Set the control of each row, or one for however many rows come; the tensors are kept while the controls stay the same."""
        if self._controls is not None and self._controls == controls:
            return
        self._controls = controls
        self._groups = _groups([controls] if isinstance(controls, Control) else controls)
        if self._groups:
            self.count_on(self._groups[0].value.device)

    def try_out(self, controls: Iterable[Control], dtype: torch.dtype) -> None:
        """Edit one state of each group: a backend that cannot run says so here, and what it precomputes from the weights is ready."""
        for control in {_group_key(control): control for control in controls}.values():
            (group,) = _groups([control])
            ascend(torch.zeros(1, group.value.hidden_size, dtype=dtype, device=group.value.device), group.value, backend=self.backend, **group.settings)

    def edit(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The edited states, (rows, hidden_size); those given are not written to. Rows outside of `mask`, (rows,), stay as they are."""
        return self.edit_and_trace(states, mask, traced=False)[0]

    @property
    def edited_rows(self) -> int:
        """How many rows were edited so far; reading it waits for the device."""
        self.warn()
        return self.counts()[0]

    def counts(self) -> tuple[int, int]:
        """How many rows were edited so far, and how many stayed unedited."""
        edited, unedited = (0, 0) if self._counts is None else self._counts.tolist()
        return edited + self._counted, unedited

    def warn(self) -> None:
        """Log, once, how many rows stayed unedited; waits for the device."""
        unedited = 0 if self._warned else self.counts()[1]
        if unedited:
            self._warned = True
            logger.warning("%d states stay unedited: they, or what the ascent makes of them, are not finite; a smaller step_size may help", unedited)

    def edit_and_trace(self, states: Tensor, mask: Tensor | None = None, *, traced: bool = True) -> tuple[Tensor, EditTrace]:
        """The edited states, and what was done to them."""
        if isinstance(self._controls, list) and states.shape[0] != len(self._controls):
            raise RuntimeError(f"{states.shape[0]} states enter the logits, controls are known for {len(self._controls)}: whose states they are is unknown")
        # No gradient flows through an edit.
        states = states.detach()
        edited, before = states, states.new_zeros(states.shape[0] if traced else 0, dtype=wide_dtype(states.dtype))
        after = before
        for value, rows, settings in self._groups:
            hidden = states if rows is None else states.index_select(0, rows)
            live = mask if mask is None or rows is None else mask.index_select(0, rows)
            finite = torch.isfinite(hidden).all(dim=1)
            able = live if _known_true(finite) else finite if live is None else live & finite
            result = ascend(hidden, value, mask=able, return_trace=traced, backend=self.backend, **settings)
            climbed, path = result if isinstance(result, tuple) else (result, None)
            kept, finite = self.keep(hidden, climbed, live)
            edited = _with_rows(edited, rows, kept)
            if path is not None:
                # A row that ends early keeps its last value, one that stays unedited its first.
                before, after = _with_rows(before, rows, path[:, 0]), _with_rows(after, rows, torch.where(finite, path[:, -1], path[:, 0]))
        norm = (edited.to(after.dtype) - states.to(after.dtype)).norm(dim=-1) if traced else after
        return edited, EditTrace(before, after, norm)

    def keep(self, states: Tensor, edited: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The edited rows, those that are not finite as they were, and which are; both are counted."""
        finite = torch.isfinite(edited).all(dim=1)
        if _known_true(finite):
            self._counted += states.shape[0] if mask is None else int(mask.sum())
            return edited, finite
        count = (finite if mask is None else mask & finite).sum()
        self._counts.add_(torch.stack([count, (states.shape[0] if mask is None else mask.sum()) - count]))
        return torch.where(finite[:, None], edited, states), finite

    def count_on(self, device: torch.device) -> None:
        """Start to count, unless it was begun; in no inference tensor, so that rows can be counted in any mode."""
        with torch.inference_mode(False):
            self._counts = torch.zeros(2, dtype=torch.int64, device=device) if self._counts is None else self._counts


def _known_true(flags: Tensor) -> bool:
    """Whether all of them are true, where that can be seen without waiting for a device: on a processor, untraced."""
    return flags.device.type == "cpu" and not is_traced() and bool(flags.all())


def _group_key(control: Control) -> Any:
    return id(control.value), control.head_weights, *(getattr(control, option.name) is None for option in ROW_OPTIONS)


def _groups(controls: Sequence[Control | None]) -> list[_Group]:
    members: dict[Any, dict[int, Control]] = {}
    for row, control in enumerate(controls):
        if control is not None:
            members.setdefault(_group_key(control), {})[row] = control
    groups = []
    for of_rows in members.values():
        first = next(iter(of_rows.values()))
        wide, device = wide_dtype(first.value.dtype), first.value.device
        settings: dict[str, Any] = {"head_weights": None if first.head_weights is None else torch.tensor(first.head_weights, dtype=wide, device=device)}
        for option in ROW_OPTIONS:
            numbers = [getattr(control, option.name) for control in of_rows.values()]
            dtype = torch.int64 if option.integer else wide
            settings[option.name] = numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, dtype=dtype, device=device)
        groups.append(_Group(first.value, None if len(of_rows) == len(controls) else torch.tensor([*of_rows], device=device), settings))
    return groups


def _with_rows(whole: Tensor, rows: Tensor | None, part: Tensor) -> Tensor:
    """`whole` with the rows of a group replaced."""
    return part if rows is None else whole.index_copy(0, rows, part)
