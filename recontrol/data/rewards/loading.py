"""What a user gives as the reward, made one callable; several rewards become the heads of one. By name too, for the command line and studies."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recontrol.checks import loading
from recontrol.data.rewards.chat import Judge
from recontrol.data.rewards.checks import Reward, checked_rewards, head_names
from recontrol.data.rewards.model import RewardModel


class CombinedReward:
    """Several rewards of the same responses, side by side; one that returns several scores a response must name them in an attribute `head_names`."""

    def __init__(self, rewards: Sequence[Reward], names: Sequence[str] | None = None):
        if not rewards:
            raise ValueError("found an empty list of rewards, wanted at least one")
        self.rewards = list(rewards)
        prefixes = [""] * len(self.rewards) if names is None else [f"{name}: " for name in names]
        seen: Counter[str] = Counter()
        self.head_names: list[str] = []
        for name in [f"{prefix}{name}" for prefix, reward in zip(prefixes, self.rewards, strict=True) for name in head_names(reward)]:
            seen[name] += 1
            self.head_names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")

    def __call__(self, prompts: list[str], responses: list[str]) -> list[list[float]]:
        """Score each response with every reward; a reward that breaks is named."""
        columns = []
        for reward in self.rewards:
            names = head_names(reward)
            try:
                table = checked_rewards(reward, prompts, responses)
            except ValueError as error:
                raise ValueError(f"reward {names[0]!r}: {error}") from error
            if len(table) and table.shape[1] != len(names):
                found = f"reward {names[0]!r} returned {table.shape[1]} scores a response"
                raise ValueError(f"{found}; among several rewards it must return one, or name them in head_names")
            columns.append(table.expand(-1, len(names)))
        return torch.cat(columns, dim=1).tolist()


def as_reward(reward: Any) -> Reward:
    """Make a callable `(prompts, responses) -> scores` of what a user gives as the reward, see `collect`; TypeError for anything else."""
    if isinstance(reward, str | os.PathLike):
        return RewardModel.from_pretrained(reward)
    if isinstance(reward, tuple) and len(reward) == 2 and isinstance(reward[0], nn.Module):
        return RewardModel(*reward)
    if isinstance(reward, Mapping):
        return CombinedReward([as_reward(part) for part in reward.values()], [str(name) for name in reward])
    if isinstance(reward, list | tuple):
        return CombinedReward([as_reward(part) for part in reward])
    if callable(reward) and not isinstance(reward, nn.Module):
        return reward
    wanted = "a callable (prompts, responses) -> scores, a pair (model, tokenizer), the name of a sequence classifier, or a list of these"
    raise TypeError(f"reward must be {wanted}; found {type(reward).__name__}")


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
    """Make one reward of names: "judge:NAME" (`judge` its arguments), "python:MODULE:FUNCTION", else a sequence classifier; several become its heads."""

    def load(name: str) -> Reward:
        kind, _, rest = name.partition(":")
        if kind == "judge" and rest:
            return Judge(rest, minimum=judge_range[0], maximum=judge_range[1], **(judge or {}))
        if kind != "python" or not rest:
            where: dict[str, Any] = {"device_map": device} if device == "auto" else {"device": device}
            with loading(name):
                return RewardModel.from_pretrained(name, batch_size=batch_size, template=template, dtype=dtype, **where)
        module, _, attribute = rest.partition(":")
        if not (module and attribute):
            raise ValueError(f"a function is named MODULE:FUNCTION, found {rest!r}")
        if os.getcwd() not in sys.path:
            # Found there too, as by `python -m`.
            sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), attribute)
        except AttributeError:
            raise ValueError(f"the module {module} has no {attribute}") from None

    return load(names[0]) if len(names) == 1 else as_reward([load(name) for name in names])
