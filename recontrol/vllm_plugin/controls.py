"""The control that a request carries, checked."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from recontrol.decoding.control import beyond_range
from recontrol.decoding.controller import Controller
from recontrol.value import ValueFunction

FIELDS = ("value", "step_size", "steps", "radius", "target", "head_weights")
# A request must not keep the others waiting: the paper takes 200 at most.
MOST_STEPS = 1000
# Characters of what a request sent that are shown in an error.
SHOWN = 100


def parse_control(given: Any, bank: Mapping[str, ValueFunction]) -> Controller | None:
    """Check what a request sent as its control.

    Args:
        given: None for no control, else a mapping with `value`, the name of a value function of the bank, and the arguments of
            `Controller` that say how far to climb; or the same as JSON, since `vllm_xargs` of the OpenAI-compatible server holds no mapping.
        bank: the value functions by name, with or without weights.

    Returns:
        The control, or None for none.

    Raises:
        ValueError: it is neither of these, has another field, names no value function of the bank, or a number is out of range.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError(f'a control must be JSON such as {{"value": "name", "step_size": 0.5, "steps": 30}}, found {_shown(given)}') from None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"a control must be a mapping with {', '.join(FIELDS)}, found {_shown(given)}")
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise ValueError(f"a control has no field {_shown(unknown[0])}; it has {', '.join(FIELDS)}")
    name = given.get("value")
    # A name of the listing, never a path: nothing outside the bank can be reached.
    if not isinstance(name, str) or name not in bank:
        found = "it is missing" if "value" not in given else f"found {_shown(name)}"
        raise ValueError(f"value must name a value function of this server, one of {', '.join(map(repr, bank))}; {found}")
    arguments = {field: given[field] for field in FIELDS[1:] if field in given}
    try:
        control = Controller(bank[name], **arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if control.steps > MOST_STEPS:
        raise ValueError(f"steps must be {MOST_STEPS} or less, found {control.steps}")
    # What the workers make of it: there, infinity would be an error that stops them all.
    field = beyond_range(control, torch.float32)
    if field is not None:
        raise ValueError(f"{field} must be within the range of float32, found {_shown(getattr(control, field))}")
    return control


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
