"""RE-Control as one method among others."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from recontrol.ascent import backends
from recontrol.decoding.control import Control
from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.controller import Controller, Handle
from recontrol.methods.base import Method, Training, tensors_checksum
from recontrol.value import ValueFunction

# The names of settings in tables, where they are others.
SHOWN = {"step_size": "alpha", "steps": "n", "head_weights": "weights"}


@dataclass(frozen=True, eq=False)
class ReControl(Method):
    """Representation editing by a value function: y_t ~ softmax(W_lm (o_t + u_t)), u_t by n gradient steps of V from u_t = 0.

    `allow_other_model` accepts a value function that was trained on another model's states; `trained` is the cost of training it, where it is known.
    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """

    kind = "RE-Control"
    control: Control
    backend: str = field(default="auto", kw_only=True)
    allow_other_model: bool = field(default=False, kw_only=True)
    trained: Training | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.control, Control):
            raise TypeError(f"control must be a recontrol.Control, found {type(self.control).__name__}")
        object.__setattr__(self, "backend", backends.check_name(self.backend))

    @property
    def settings(self) -> dict[str, Any]:
        """Step size, steps, and what else is set."""
        return {SHOWN.get(name, name): setting for name, setting in settings_of(self.control).items() if name != "value" and setting is not None}

    @property
    def identity(self) -> str:
        """A checksum of the value function's weights."""
        return tensors_checksum(self.control.value.parameters())

    @property
    def training(self) -> Training:
        """As given, else the value function's parameters alone."""
        return self.trained or training_of(self.control.value)

    def edit(self, states: Tensor) -> Tensor:
        """(rows, hidden_size) -> o_t + u_t."""
        return climb(states, self.control, backend=self.backend)

    def attach(self, model: Any) -> Handle:
        """A controller; rows that have ended are not edited."""
        return Controller(**settings_of(self.control), backend=self.backend, allow_other_model=self.allow_other_model).attach(model)


def settings_of(control: Control) -> dict[str, Any]:
    """The value function and the settings of a control, by name."""
    return {each.name: getattr(control, each.name) for each in dataclasses.fields(Control)}


def climb(states: Tensor, control: Control, *, backend: str = "auto") -> Tensor:
    """(rows, hidden_size) -> o_t + u_t, as decoding under this control edits them."""
    batch = ControlBatch(backend)
    batch.assign(control)
    edited = batch.edit(states)
    batch.warn()
    return edited


def training_of(value: ValueFunction) -> Training:
    """The number of parameters of a value function; the cost of its training is unknown."""
    return Training(sum(parameter.numel() for parameter in value.parameters()), None, None)
