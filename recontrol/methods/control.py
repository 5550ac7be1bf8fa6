"""RE-Control as one method among others."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.ascent import backends
from recontrol.ascent.ascend import ascend
from recontrol.decoding.batches import finishing_tokens
from recontrol.decoding.control import Control
from recontrol.decoding.controller import Controller
from recontrol.methods.base import Method, Training, tensors_checksum
from recontrol.value import ValueFunction


@dataclass(frozen=True, eq=False)
class ReControl(Method):
    """Representation editing by a value function: y_t ~ softmax(W_lm (o_t + u_t)), u_t by n gradient steps of V from u_t = 0.

    With `target` in the control the state is steered to a value; with a value function of several heads, or a weighted sum of value functions, towards
    several rewards at once.

    Args:
        control: value function, step size, steps, radius, target, weights of the heads.
        backend: of the ascent, as for `recontrol.ascend`.
        allow_other_model: accept a value function that was trained on the states of another model.
        trained: what training the value function took, where it is known.

    Raises:
        TypeError, ValueError: `control` is no `Control`, or an unknown backend.

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
        chosen = self.control
        optional = {"radius": chosen.radius, "target": chosen.target, "weights": chosen.head_weights}
        return {"alpha": chosen.step_size, "n": chosen.steps, **{name: setting for name, setting in optional.items() if setting is not None}}

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
        chosen = self.control
        weights = None if chosen.head_weights is None else torch.tensor(chosen.head_weights, device=states.device)
        options: dict[str, Any] = {"radius": chosen.radius, "target": chosen.target, "head_weights": weights, "backend": self.backend}
        return cast(Tensor, ascend(states, chosen.value, chosen.step_size, chosen.steps, **options))

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Attach a controller inside the block.

        Args:
            model: the language model.
            tokenizer: its tokenizer.
            prompts: not looked at.
            options: of `model.generate`; rows that ended by them are not edited.
        """
        chosen = self.control
        controller = Controller(
            chosen.value,
            chosen.step_size,
            chosen.steps,
            radius=chosen.radius,
            target=chosen.target,
            head_weights=chosen.head_weights,
            backend=self.backend,
            stop_token_ids=finishing_tokens(model, tokenizer, dict(options)),
            allow_other_model=self.allow_other_model,
        )
        with controller.attach(model):
            yield []


def training_of(value: ValueFunction) -> Training:
    """What is known of a value function's training where nobody has said more: how many parameters it has.

    Args:
        value: the value function.
    """
    return Training(sum(parameter.numel() for parameter in value.parameters()), None, None)
