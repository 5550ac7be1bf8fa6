"""Hooks that give every request in a batch its own control."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recontrol.ascent import backends
from recontrol.checks import wide_dtype
from recontrol.decoding.control import Control
from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.generation.requests import Trace


class Rows(NamedTuple):
    """Which states of a forward call are read to sample the next token of which request."""

    requests: list[int]
    # For each request the place of its state among those that the output embedding reads; or, with `last`, its sequence, whose last state is read.
    places: list[int]
    last: bool


class _Kept(NamedTuple):
    """What is known of a traced call between the output embedding and the end of the model."""

    # Of the states without the added ones, but for their size.
    shape: torch.Size
    # Of the edited states; the unedited ones were added behind all others.
    places: Tensor
    requests: list[int]


class RequestEditing(Editing):
    """Edits the states of each request by its own control, whatever rows of a batch the requests are in; the others stay as they are.

    Attributes:
        source: says which rows a forward call has, from its arguments; None for calls that are not to be edited. Set by who runs the model.
        traces: one for each request that has a control; with `trace` only. The unedited states then go through the output embedding too.
    """

    def __init__(self, model: Any, controls: Sequence[Control | None], *, backend: str = "auto", allow_other_model: bool = False, trace: bool = False):
        super().__init__(model)
        self.source: Callable[[dict[str, Any]], Rows | None] = lambda given: None
        self.traces: dict[int, Trace] = {index: Trace() for index, control in enumerate(controls) if control is not None} if trace else {}
        # Without steps there is nothing to do, unless the value is to be traced.
        self._controls = {index: control for index, control in enumerate(controls) if control is not None and (trace or control.steps > 0)}
        self._places: tuple[list[int], Tensor] | None = None
        self._batch = ControlBatch(backends.check_name(backend))
        for index, control in self._controls.items():
            control.check_range(wide_dtype(self.dtype()), f" in the control of prompt {index}")
        for value in {id(control.value): control.value for control in self._controls.values()}.values():
            check_fit(self, value, allow_other_model)
        self._batch.try_out(self._controls.values(), self.dtype())
        self.attach(self_check=self.steers)

    def detach(self) -> None:
        """Remove the hooks; the model is as it was. May be called again."""
        super().detach()
        self._batch.warn()

    @property
    def steers(self) -> bool:
        """Whether any request has a control that does something."""
        return bool(self._controls)

    def rows(self, given: dict[str, Any]) -> Rows | None:
        """The rows of this call."""
        return self.source(given)

    def edit(self, hidden: Tensor, rows: Rows | None) -> Tensor | None:
        """The states after the ascents; in a traced call the unedited ones behind them."""
        steps = hidden.shape[-2]
        found = {} if rows is None else dict(zip(rows.requests, rows.places, strict=True))
        requests = [request for request in found if request in self._controls]
        if rows is None or not requests:
            return None
        place = self._place([found[request] * steps + steps - 1 if rows.last else found[request] for request in requests], hidden.device)
        states = hidden.reshape(-1, hidden.shape[-1])
        chosen = states.index_select(0, place)
        self._batch.assign([self._controls[request] for request in requests])
        if not self.traces:
            return states.index_copy(0, place, self._batch.edit(chosen)).reshape(hidden.shape)
        edited, trace = self._batch.edit_and_trace(chosen)
        for request, *numbers in zip(requests, *(each.tolist() for each in trace), strict=True):
            self.traces[request].add_edit(*numbers)
        # The unedited states go the same way to the logits, whatever the model does to them after the output embedding.
        self._call.kept = _Kept(hidden.shape[:-1], place, requests)
        return torch.cat([states.index_copy(0, place, edited), chosen])[None]

    # Which rows there are changes from step to step: the compiler would compile each step again.
    _before_model = torch.compiler.disable(Editing._before_model)
    _before_site = torch.compiler.disable(Editing._before_site)

    @torch.compiler.disable
    def _after_model(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super()._after_model(owner, args, output)
        kept, self._call.kept = self._call.kept, None
        # None after an error.
        if kept is None or output is None:
            return
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        count = kept.shape.numel()
        for request, moved in zip(kept.requests, divergence(logits[kept.places], logits[count:]).tolist(), strict=True):
            self.traces[request].divergence.append(moved)
        output.logits = logits[:count].reshape(*kept.shape, -1)

    def _place(self, places: list[int], device: torch.device) -> Tensor:
        """The places as a tensor, kept while they stay the same."""
        if self._places is None or self._places[0] != places:
            self._places = places, torch.tensor(places, device=device)
        return self._places[1]
