"""Hooks that give every row of a batch its own control."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recontrol.ascent import backends
from recontrol.ascent.ascend import ascend
from recontrol.decoding.control import Control, beyond_range
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.generation.requests import Trace


class Rows(NamedTuple):
    """Which states of a forward call are read to sample the next token of which request.

    Attributes:
        requests: the requests, as places in the list of controls.
        places: for each of them, the place of its state among those that the output embedding reads; or, with `last`, its sequence, whose
            last state is meant.
        last: what `places` counts.
    """

    requests: list[int]
    places: list[int]
    last: bool


@dataclass(frozen=True, eq=False)
class _Group:
    """Controls that one call of `ascend` can serve: one value function, and the same options in use.

    Attributes:
        first: any of them, for what they share.
        requests: whose control is in this group.
    """

    first: Control
    requests: frozenset[int]


class _Kept(NamedTuple):
    """What is known of a traced call between the output embedding and the end of the model.

    Attributes:
        shape: of the states without the added ones, but for their size.
        places: of the edited states, whose unedited ones were added behind all others.
        requests: whose they are.
    """

    shape: torch.Size
    places: Tensor
    requests: list[int]


class _Call(threading.local):
    """The forward call that this thread is in."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.kept: _Kept | None = None


class Steering(Editing):
    """Edits the states of each request by its own control, whatever rows of a batch the requests are in.

    The states are grouped by value function; each group is one call of `recontrol.ascend` with step size, steps, radius and target row by row.
    A row's edit does not depend, to the bit, on its neighbours. States of requests without control are left as they are.

    Args:
        model: a causal language model of transformers.
        controls: one for each request.
        backend: as for `recontrol.ascend`.
        allow_other_model: accept value functions that were trained on the states of another model.
        trace: record what the edits do. The unedited states then go through the output embedding too.

    Attributes:
        source: says which rows a forward call has, from its keyword arguments; None for calls that are not to be edited. Set by who runs the model.
        traces: one for each request that has a control; with `trace` only.

    Raises:
        TypeError, ValueError, RuntimeError: as `Controller.attach`.
    """

    def __init__(self, model: Any, controls: Sequence[Control | None], *, backend: str = "auto", allow_other_model: bool = False, trace: bool = False):
        super().__init__(model)
        self.controls = list(controls)
        self.backend = backends.check_name(backend)
        self.source: Callable[[dict[str, Any]], Rows | None] = lambda given: None
        self.traces: dict[int, Trace] = {index: Trace() for index, control in enumerate(controls) if control is not None} if trace else {}
        self._groups = _grouped(self.controls, trace)
        self._call = _Call()
        _check_range(self.controls, _wide(self.dtype()))
        for value in {id(group.first.value): group.first.value for group in self._groups}.values():
            check_fit(self, value, allow_other_model)
        for group in self._groups:
            # A backend that cannot run says so here, and what it precomputes from the weights is ready.
            hidden = torch.zeros(1, group.first.value.hidden_size, dtype=self.dtype(), device=group.first.value.device)
            self._ascend(group, [min(group.requests)], hidden)
        with self._attaching(self_check=bool(self._groups)):
            self._hooks.append(self.owner.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._hooks.append(self.owner.register_forward_hook(self._after_model, always_call=True))
            self._hooks.append(self.embedding.register_forward_pre_hook(self._before_embedding))

    # Which rows there are changes from step to step: the compiler would compile each step anew.
    @torch.compiler.disable
    def _before_model(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call.rows = None if self._sign is not None else self.source(kwargs)

    @torch.compiler.disable
    def _before_embedding(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if self._sign is not None:
            return (hidden * self._sign, *args[1:])
        rows = self._call.rows
        if rows is None or self._paused or not self._groups:
            return None
        steps = hidden.shape[-2]
        place_of = {request: place * steps + steps - 1 if rows.last else place for request, place in zip(rows.requests, rows.places, strict=True)}
        states = hidden.reshape(-1, hidden.shape[-1])
        edited = states.clone()
        places, requests = [], []
        for group in self._groups:
            chosen = [request for request in rows.requests if request in group.requests]
            if chosen:
                place = torch.tensor([place_of[request] for request in chosen], device=hidden.device)
                edited[place] = self._ascend(group, chosen, states[place])
                places.append(place)
                requests += chosen
        if not self.traces or not requests:
            return (edited.reshape(hidden.shape), *args[1:])
        together = torch.cat(places)
        for request, norm in zip(requests, (edited[together].float() - states[together].float()).norm(dim=-1).tolist(), strict=True):
            self.traces[request].edit_norm.append(norm)
        # The unedited states go the same way to the logits, whatever the model does to them after the output embedding.
        self._call.kept = _Kept(hidden.shape[:-1], together, requests)
        return (torch.cat([edited, states[together]])[None], *args[1:])

    @torch.compiler.disable
    def _after_model(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept, self._call.kept, self._call.rows = self._call.kept, None, None
        # None after an error.
        if kept is None or output is None:
            return
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        count = kept.shape.numel()
        for request, moved in zip(kept.requests, divergence(logits[kept.places], logits[count:]).tolist(), strict=True):
            self.traces[request].divergence.append(moved)
        output.logits = logits[:count].reshape(*kept.shape, -1)

    def _ascend(self, group: _Group, requests: list[int], hidden: Tensor) -> Tensor:
        wide = _wide(hidden.dtype)

        def by_row(name: str, dtype: torch.dtype = wide) -> Tensor:
            return torch.tensor([getattr(self.controls[request], name) for request in requests], dtype=dtype, device=hidden.device)

        keywords: dict[str, Any] = {name: by_row(name) for name in ("radius", "target") if getattr(group.first, name) is not None}
        if group.first.head_weights is not None:
            keywords["head_weights"] = torch.tensor(group.first.head_weights, dtype=wide, device=hidden.device)
        steps = by_row("steps", torch.int64)
        result = ascend(hidden, group.first.value, by_row("step_size"), steps, return_trace=bool(self.traces), backend=self.backend, **keywords)
        if not isinstance(result, tuple):
            return result
        edited, path = result
        if self.attached:
            # A row that ends early keeps its last value.
            for request, before, after in zip(requests, path[:, 0].tolist(), path[:, -1].tolist(), strict=True):
                self.traces[request].value_before.append(before)
                self.traces[request].value_after.append(after)
        return edited


def _grouped(controls: Sequence[Control | None], trace: bool) -> list[_Group]:
    """The groups of controls; those of no steps are in none, unless their value is to be traced."""
    groups: dict[Any, list[int]] = {}
    for index, control in enumerate(controls):
        if control is not None and (trace or control.steps > 0):
            key = (id(control.value), control.head_weights, control.radius is None, control.target is None)
            groups.setdefault(key, []).append(index)
    return [_Group(first, frozenset(indices)) for indices in groups.values() if (first := controls[indices[0]]) is not None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers of an ascent whose states have this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_range(controls: Sequence[Control | None], dtype: torch.dtype) -> None:
    """Refuse what would be infinite in this dtype, which would come out at the first token of its prompt only."""
    for index, control in enumerate(controls):
        name = None if control is None else beyond_range(control, dtype)
        if name is not None:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be within the range of {kind}, found {getattr(control, name)} in the control of prompt {index}")
