"""Rewards by name, as the command line and studies give them."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recontrol.data.rewards.checks import Reward
from recontrol.data.rewards.combined import as_reward
from recontrol.data.rewards.judge import Judge
from recontrol.data.rewards.model import RewardModel


def load_reward(
    names: Sequence[str],
    *,
    batch_size: int = 16,
    template: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    judge_range: tuple[float, float] = (1.0, 10.0),
    judge: Mapping[str, Any] | None = None,
) -> Reward:
    """Make one reward of names; several become its heads.

    "judge:NAME" is a chat model that is asked for a score in `judge_range`, `judge` being further arguments of `Judge`.
    "python:MODULE:FUNCTION" is a function (prompts, responses) -> scores. Anything else is a sequence classifier: a folder, or a name on the hub.
    """

    def load(name: str) -> Reward:
        kind, _, rest = name.partition(":")
        if kind == "judge" and rest:
            lowest, highest = judge_range
            return Judge(rest, minimum=lowest, maximum=highest, **(judge or {}))
        if kind == "python" and rest:
            return _function(rest)
        where: dict[str, Any] = {"device_map": device} if device == "auto" else {"device": device}
        return RewardModel.from_pretrained(name, batch_size=batch_size, template=template, dtype=dtype, **where)

    return load(names[0]) if len(names) == 1 else as_reward([load(name) for name in names])


def _function(name: str) -> Reward:
    """The function that MODULE:FUNCTION names; modules in the current folder are found too, as by `python -m`."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"a function is named MODULE:FUNCTION, found {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise ValueError(f"the module {module} has no {attribute}") from None
