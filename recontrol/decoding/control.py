"""The settings of an ascent, checked when they are made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from recontrol.checks import integer, number, several
from recontrol.value import ValueFunction

# Far more than anybody means, and few enough for the integers of every kernel.
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Control:
    """What is done to the states of one response: u <- u + alpha * grad V(o_t + u), n times, starting at u = 0.

    `recontrol.generate` takes one for each prompt. `Controller` has the same settings for all rows of any model that it is attached to.

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
        check_settings(self)


def check_settings(settings: Any) -> None:
    """Check the settings that `Control` and `Controller` have in common, and bring them to plain numbers.

    Args:
        settings: has the attributes of `Control`, which are set anew, although it may be frozen.

    Raises:
        TypeError, ValueError: as `Control`.
    """
    if not isinstance(settings.value, ValueFunction):
        raise TypeError(f"value must be a recontrol.ValueFunction, found {type(settings.value).__name__}")
    checked: dict[str, Any] = {"step_size": number("step_size", settings.step_size, 0), "steps": integer("steps", settings.steps)}
    if checked["steps"] > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}, found {settings.steps}")
    if settings.radius is not None:
        checked["radius"] = number("radius", settings.radius, 0)
    if settings.target is not None:
        checked["target"] = number("target", settings.target)
    checked["head_weights"] = _head_weights(settings.head_weights, settings.value.num_heads)
    for name, argument in checked.items():
        object.__setattr__(settings, name, argument)


def beyond_range(settings: Any, dtype: torch.dtype) -> str | None:
    """The first of the settings that would be infinite in a dtype, which an ascent refuses; None where all of them can be held.

    Args:
        settings: has the attributes of `Control`.
        dtype: of the numbers of the ascent.
    """
    for name in ("step_size", "radius", "target", "head_weights"):
        held = getattr(settings, name)
        if held is not None and not torch.tensor(held, dtype=dtype).isfinite().all():
            return name
    return None


def _head_weights(given: Any, num_heads: int) -> tuple[float, ...] | None:
    if given is None:
        if num_heads != 1:
            raise ValueError(f"the value function has {num_heads} heads: give head_weights, {num_heads} numbers")
        return None
    weights = tuple(number("head_weights", weight) for weight in several("head_weights", given))
    if len(weights) != num_heads:
        raise ValueError(f"head_weights must be {num_heads} numbers, one a head, found {len(weights)}")
    return weights
