"""Decoding under control: a `Control` that is attached to a language model."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent import backends
from recontrol.ascent.arguments import normalise
from recontrol.checks import integer, several, wide_dtype
from recontrol.decoding.control import SETTINGS, Control
from recontrol.decoding.editing import Editing, check_fit
from recontrol.decoding.hooks import CACHE_NAMES, unfinished_rows


@dataclass(frozen=True, eq=False)
class Controller(Control):
    """Adds a control signal to the state that is read to sample each token: y_t ~ softmax(W_lm (o_t + u_t)), u_t from `recontrol.ascend` on o_t.

    Only positions whose logits are computed are edited, and the key/value cache is not touched. Rows that `generate` has finished are not edited where
    they can be told. A row stays unedited, and a warning says so, if its state is not finite or if the edit would leave the range of its dtype.

    Args:
        value: as for `Control`, like the next five; its dtype may be another than the model's.
        step_size: alpha >= 0.
        steps: n >= 0; with 0 nothing is edited.
        radius: cut the edit where its norm reaches this.
        target: climb towards this value instead of upward.
        head_weights: (num_heads,) numbers, required if there are several heads.
        backend: as for `recontrol.ascend`.
        stop_token_ids: rows with one of these at a decode step are finished; by default `generate` is asked which are, `()`: rows are never finished.
        allow_other_model: attach although `value` was trained on the states of another model.
        self_check: prove at attach, by running the model on one token three times, that edits reach the logits.

    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """

    backend: str = field(default="auto", kw_only=True)
    stop_token_ids: Sequence[int] | None = field(default=None, kw_only=True)
    allow_other_model: bool = field(default=False, kw_only=True)
    self_check: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "backend", backends.check_name(self.backend))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(integer("stop_token_ids", token) for token in several("stop_token_ids", self.stop_token_ids)))

    def attach(self, model: Any) -> "Handle":
        """Put the hooks in place; `with controller.attach(model) as handle: model.generate(...)` removes them at the end.

        The model is a causal language model of transformers, compiled or not; for a pipeline, its `model`. A TypeError or ValueError says why `value` does
        not go with it, a RuntimeError that one is attached already, the backend cannot run here, or edits do not reach the logits.
        """
        return Handle(self, model)


class Handle(Editing):
    """The hooks of one controller on one model, made by `Controller.attach`; `detach` or leaving its `with` block removes them."""

    def __init__(self, controller: Controller, model: Any):
        super().__init__(model)
        self.controller = controller
        self.steers, self.stop_token_ids = controller.steps > 0, controller.stop_token_ids
        check_fit(self, controller.value, controller.allow_other_model)
        controller.check_range(wide_dtype(self.dtype()))
        self._batch.backend = controller.backend
        self._batch.assign(controller)
        self._batch.try_out([controller], self.dtype())
        self.attach(self_check=controller.self_check)

    @property
    def edited_rows(self) -> int:
        """How many states were edited so far, finished rows not counted; reading it waits for the device."""
        return self._batch.edited_rows

    def backend(self, rows: int) -> str:
        """The name of the backend that climbs from this many states: the controller's, or what "auto" takes for them."""
        value, settings = self.controller.value, {name: getattr(self.controller, name) for name in SETTINGS}
        hidden = torch.zeros(rows, value.hidden_size, dtype=self.dtype(), device=value.device)
        return backends.choose(self.controller.backend, normalise(hidden, value, **settings), value.prepared()).name

    def rows(self, given: dict[str, Any]) -> tuple[Tensor, Any] | None:
        """Which rows are live, (batch,), or the tokens of a decode step, (batch, 1), and its cache where its length is on the device; else None."""
        if self.stop_token_ids is None:
            live = None if torch.compiler.is_compiling() else unfinished_rows(self.embedding)
            return None if live is None else (live, None)
        ids = given.get("input_ids")
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if not self.stop_token_ids or cache is None or ids is None or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        try:
            length = cache.get_seq_length()
        except ValueError:
            # A cache of recurrent states only has no length.
            length = int(cache.has_previous_state())
        if isinstance(length, Tensor):
            return ids, cache
        return (ids, None) if length > 0 else None

    def edit(self, hidden: Tensor, rows: tuple[Tensor, Any] | None) -> Tensor | None:
        """The states after the ascent; finished rows as they were."""
        if self.controller.steps == 0:
            return None
        states = hidden.reshape(-1, hidden.shape[-1])
        # No mask if row counts differ.
        mask = None if rows is None or rows[0].shape[0] != states.shape[0] else self._live(*rows).to(states.device)
        return self._batch.edit(states, mask).reshape(hidden.shape)

    def _live(self, told: Tensor, cache: Any) -> Tensor:
        if told.dtype == torch.bool:
            return told
        finished = functools.reduce(operator.or_, (told[:, 0] == token for token in self.stop_token_ids or ()))
        if cache is not None:
            # All layers have put the token into the cache. A static cache keeps its length on the device; reading it here would wait for the device.
            finished = finished & (cache.get_seq_length() > 1).to(told.device)
        return ~finished
