"""Static representation editing: the same vector is added to every state that is read to sample a token."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import number
from recontrol.decoding.editing import Editing
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import input_width
from recontrol.methods.base import Method, Training, tensors_checksum
from recontrol.methods.directions import Direction


@dataclass(frozen=True, eq=False)
class StaticEditing(Method):
    """Representation editing by a constant: y_t ~ softmax(W_lm (o_t + strength * d)).

    Time index: o_t is the state at the position whose logits sample y_t. Only positions whose logits are computed are edited: with `generate`, one row a
    sequence, at prefill too. Rows that have ended are edited as well, which changes nothing that is kept and takes no time.

    Args:
        direction: d, which is as long as a state is on average.
        strength: what share of that length a state is moved; 0 moves it nowhere, a negative one lowers the reward.
        allow_other_model: accept a direction that was found in the states of another model.

    Raises:
        TypeError, ValueError: `direction` is no `Direction`, or `strength` no finite number.

    Source: Kong et al. 2024, section 5 (baselines: static representation editing).
    """

    kind = "static editing"
    direction: Direction
    strength: float
    allow_other_model: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise TypeError(f"direction must be a Direction, found {type(self.direction).__name__}")
        object.__setattr__(self, "strength", number("strength", self.strength))

    @property
    def settings(self) -> dict[str, Any]:
        """Where the direction is from, and the strength."""
        return {"by": self.direction.origin, "strength": self.strength}

    @property
    def identity(self) -> str:
        """A checksum of the direction."""
        return tensors_checksum([self.direction.vector])

    @property
    def training(self) -> Training:
        """The numbers of the direction, and how long it took to find them where that was recorded."""
        return Training(self.direction.hidden_size, self.direction.provenance.get("training_seconds"), None)

    def edit(self, states: Tensor) -> Tensor:
        """(rows, hidden_size) -> o_t + strength * d, in the dtype of the states."""
        return _moved(states, self._edit_of(states))

    def attach(self, model: Any) -> "StaticHandle":
        """Put the hook in place; `with editing.attach(model): model.generate(...)` removes it at the end.

        Args:
            model: a causal language model of transformers, compiled or not.

        Returns:
            The handle, already attached.

        Raises:
            TypeError: `model` is no language model.
            ValueError: the direction is for another hidden size, or was found in the states of another model.
            RuntimeError: something that edits is attached already, or edits do not reach the logits.
        """
        return StaticHandle(self, model)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Attach the hook inside the block.

        Args:
            model: the language model.
            tokenizer: not looked at.
            prompts: not looked at.
            options: not looked at.
        """
        with self.attach(model):
            yield []

    def _edit_of(self, states: Tensor) -> Tensor:
        """(hidden_size,), float32, what is added, where the states are."""
        return (self.strength * self.direction.vector).to(states.device)


class StaticHandle(Editing):
    """The hook of static editing on one model, made by `StaticEditing.attach`; `detach` or leaving its `with` block removes it.

    Args:
        editing: what to add.
        model: the model.

    Raises:
        TypeError, ValueError, RuntimeError: as `StaticEditing.attach`.
    """

    def __init__(self, editing: StaticEditing, model: Any):
        super().__init__(model)
        self.editing = editing
        direction, kind = editing.direction, type(self.owner).__name__
        width = input_width(self.owner, self.embedding)
        if direction.hidden_size != width:
            raise ValueError(f"the direction is for hidden states of size {direction.hidden_size}, the output embedding of this {kind} reads size {width}")
        recorded = direction.provenance.get("base_model")
        other = difference(recorded, self.model) if isinstance(recorded, dict) and not editing.allow_other_model else None
        if other is not None:
            raise ValueError(f"the direction was found in the states of another model: {other}; attach it anyway with allow_other_model=True")
        weight = getattr(self.embedding, "weight", direction.vector)
        # Moved once, so that a decode step copies nothing.
        self._edit = editing._edit_of(direction.vector if weight.is_meta else weight)
        self.attach()

    def edit(self, hidden: Tensor, rows: Any) -> Tensor | None:
        """The states moved by the constant."""
        return None if self.editing.strength == 0 else _moved(hidden, self._edit)


def _moved(states: Tensor, edit: Tensor) -> Tensor:
    """The sum, rounded once to the dtype of the states."""
    return (states + edit).to(states.dtype)
