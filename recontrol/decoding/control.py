"""The settings of an ascent: declared, checked and read from a mapping here and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from recontrol.ascent.arguments import ROW_OPTIONS
from recontrol.checks import dtype_name, integer, number, several
from recontrol.configs import from_mapping
from recontrol.value import ValueFunction

# Upper bound of `steps`: must fit int32.
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Control:
    """What is done to the states of one response: u <- u + alpha * grad V(o_t + u), n times, starting at u = 0.

    `recontrol.generate` takes one for each prompt; `Controller` is one for all rows of a model that it is attached to.

    Args:
        value: the value function to climb, on the model's device; `0.7 * helpful + 0.3 * harmless` is one too.
        step_size: alpha >= 0.
        steps: n >= 0; with 0 nothing is edited.
        radius: cut the edit where its norm reaches this.
        target: climb towards this value instead of upward, in V's own unit: where V is standardised, `value.from_reward` makes it of rewards.
        head_weights: (num_heads,) numbers, the objective is the weighted sum of the heads; required if there are several.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number that is NaN, infinite or (but for `target` and `head_weights`) negative, `head_weights` missing or of the wrong length.

    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """

    value: ValueFunction
    step_size: float = 0.5
    steps: int = 30
    radius: float | None = None
    target: float | None = None
    head_weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.value, ValueFunction):
            raise TypeError(f"value must be a recontrol.ValueFunction, found {type(self.value).__name__}")
        for option in ROW_OPTIONS:
            given = getattr(self, option.name)
            if given is not None or not option.optional:
                checked = integer(option.name, given) if option.integer else number(option.name, given, option.minimum)
                object.__setattr__(self, option.name, checked)
        if self.steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, found {self.steps}")
        object.__setattr__(self, "head_weights", _head_weights(self.head_weights, self.value.num_heads))

    def check_range(self, dtype: torch.dtype, where: str = "") -> None:
        """Refuse, before the first token, settings that are infinite in the dtype of the ascent."""
        for name in (*(option.name for option in ROW_OPTIONS), "head_weights"):
            given = getattr(self, name)
            numbers = given if isinstance(given, tuple) else () if given is None else (given,)
            if any(abs(each) > torch.finfo(dtype).max for each in numbers):
                raise ValueError(f"{name} must be within the range of {dtype_name(dtype)}, found {given}{where}")


def control_from_mapping(given: Any, value_of: Callable[[Any], ValueFunction], where: str = "control") -> Control:
    """The control that a mapping of its fields describes; `value_of` makes the value function from the entry `value`, None where there is none.

    Raises:
        ValueError: no mapping, an unknown field, one of the wrong type, or what `Control` refuses.
    """
    named = isinstance(given, Mapping)
    return from_mapping(Control, {**given, "value": value_of(given.get("value"))} if named else given, where)


def _head_weights(given: Any, num_heads: int) -> tuple[float, ...] | None:
    if given is None:
        if num_heads != 1:
            raise ValueError(f"the value function has {num_heads} heads: give head_weights, {num_heads} numbers")
        return None
    weights = tuple(number("head_weights", weight) for weight in several("head_weights", given))
    if len(weights) != num_heads:
        raise ValueError(f"head_weights must be {num_heads} numbers, one a head, found {len(weights)}")
    return weights
