"""Hooks that give every request in a batch its own control."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recontrol.ascent import backends
from recontrol.decoding.control import Control
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.generation.requests import Trace


class Rows(NamedTuple):
    """For each request the place of its next state among those that the output embedding reads, or, with `last`, its sequence, whose last state is read."""

    requests: list[int]
    places: list[int]
    last: bool


class _Kept(NamedTuple):
    """A traced call after the output embedding: the shape of the states but for the added, unedited ones, and the places of the edited ones."""

    shape: torch.Size
    places: Tensor
    requests: list[int]


class RequestEditing(Editing):
    """Edits the states of each request by its own control; who runs the model sets `source`, from the arguments of a forward call to its rows, or None."""

    def __init__(self, model: Any, controls: Sequence[Control | None], *, backend: str = "auto", allow_other_model: bool = False, trace: bool = False):
        super().__init__(model)
        self.source: Callable[[dict[str, Any]], Rows | None] = lambda given: None
        # Without steps there is nothing to do, unless the value is to be traced.
        self._controls = {index: control for index, control in enumerate(controls) if control is not None and (trace or control.steps > 0)}
        self.steers = bool(self._controls)
        # The unedited states then go through the output embedding too.
        self.traces = {index: Trace() for index in self._controls} if trace else {}
        self._places: tuple[list[int], Tensor] | None = None
        self._batch.backend = backends.check_name(backend)
        for value in dict.fromkeys(control.value for control in self._controls.values()):
            check_fit(self, value, allow_other_model)
        self._batch.try_out(self._controls.values(), self.dtype())
        self.attach(self_check=self.steers)

    def rows(self, given: dict[str, Any]) -> Rows | None:
        """The rows of this call."""
        return self.source(given)

    def edit(self, hidden: Tensor, rows: Rows | None) -> Tensor | None:
        """The states after the ascents; in a traced call the unedited ones behind them."""
        found = {} if rows is None else {request: place for request, place in zip(rows.requests, rows.places, strict=True) if request in self._controls}
        if rows is None or not found:
            return None
        steps = hidden.shape[-2]
        requests, places = list(found), [place * steps + steps - 1 if rows.last else place for place in found.values()]
        if self._places is None or self._places[0] != places:
            # Kept while they stay the same.
            self._places = places, torch.tensor(places, device=hidden.device)
        place = self._places[1]
        states = hidden.reshape(-1, hidden.shape[-1])
        chosen = states.index_select(0, place)
        self._batch.assign([self._controls[request] for request in requests])
        if not self.traces:
            return states.index_copy(0, place, self._batch.edit(chosen)).reshape(hidden.shape)
        edited, trace = self._batch.edit_and_trace(chosen)
        for name, numbers in trace._asdict().items():
            for request, each in zip(requests, numbers.tolist(), strict=True):
                getattr(self.traces[request], name).append(each)
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
