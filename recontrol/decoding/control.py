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
# What a control has beside its value function.
SETTINGS = (*(option.name for option in ROW_OPTIONS), "head_weights")


@dataclass(frozen=True, eq=False)
class Control:
    """What is done to the states of one response: u <- u + alpha * grad V(o_t + u), n times, starting at u = 0; for `recontrol.generate`.

    Args:
        value: the value function to climb, on the model's device; `0.7 * helpful + 0.3 * harmless` is one too.
        step_size: alpha >= 0.
        steps: n >= 0; with 0 nothing is edited.
        radius: cut the edit where its norm reaches this.
        target: climb towards this value instead of upward, in V's own unit: where V is standardised, `value.from_reward` makes it of rewards.
        head_weights: (num_heads,) numbers, the objective is the weighted sum of the heads; required if there are several.

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
        heads = self.value.num_heads
        if self.head_weights is None and heads != 1:
            raise ValueError(f"the value function has {heads} heads: give head_weights, {heads} numbers")
        if self.head_weights is not None:
            weights = tuple(number("head_weights", weight) for weight in several("head_weights", self.head_weights))
            if len(weights) != heads:
                raise ValueError(f"head_weights must be {heads} numbers, one a head, found {len(weights)}")
            object.__setattr__(self, "head_weights", weights)

    def check_range(self, dtype: torch.dtype, where: str = "") -> None:
        """Refuse, before the first token, settings that are infinite in the dtype of the ascent."""
        for name in SETTINGS:
            given = getattr(self, name)
            if given is not None and any(abs(each) > torch.finfo(dtype).max for each in (given if isinstance(given, tuple) else (given,))):
                raise ValueError(f"{name} must be within the range of {dtype_name(dtype)}, found {given}{where}")


def control_from_mapping(given: Any, value_of: Callable[[Any], ValueFunction], where: str = "control") -> Control:
    """The control that a mapping of its fields describes (else a ValueError); `value_of` makes the value function from the entry `value` or None."""
    named = isinstance(given, Mapping)
    return from_mapping(Control, {**given, "value": value_of(given.get("value"))} if named else given, where)
