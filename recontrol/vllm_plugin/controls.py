"""The control that a request carries, checked."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from recontrol.decoding.control import Control, control_from_mapping
from recontrol.value import ValueFunction

# A policy of the server: a request must not keep the others waiting. The paper takes 200 steps at most.
MOST_STEPS = 1000
# Characters of what a request sent that an error shows.
SHOWN = 100


def parse_control(given: Any, bank: Mapping[str, ValueFunction]) -> Control | None:
    """The control of a request: None, a mapping with the fields of `Control`, where `value` is a name of the bank, or the same as JSON.

    JSON, because `vllm_xargs` of the OpenAI-compatible server holds no mapping. The value functions of the bank may lack weights.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError(f'a control must be JSON such as {{"value": "name", "step_size": 0.5, "steps": 30}}, found {_shown(given)}') from None
    if given is None:
        return None

    def value_of(name: Any) -> ValueFunction:
        # A name of the listing, never a path: nothing outside the bank can be reached.
        if not isinstance(name, str) or name not in bank:
            found = "it is missing" if name is None else f"found {_shown(name)}"
            raise ValueError(f"value must name a value function of this server, one of {', '.join(map(repr, bank))}; {found}")
        return bank[name]

    control = control_from_mapping(given, value_of)
    if control.steps > MOST_STEPS:
        raise ValueError(f"steps must be {MOST_STEPS} or less, found {control.steps}")
    control.check_range(torch.float32)
    return control


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
