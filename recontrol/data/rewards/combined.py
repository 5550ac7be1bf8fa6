"""What a user gives as the reward, made one callable; several rewards become the heads of one."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recontrol.data.rewards.checks import Reward, checked_rewards, head_names
from recontrol.data.rewards.model import RewardModel


class CombinedReward:
    """Several rewards of the same responses, side by side: the scores of the first, then those of the second, and so on.

    A reward that returns several scores a response must name them in an attribute `head_names`. The names of the result, one a score, are
    `head_names`: with `names`, each after the name of its reward; equal ones are numbered.
    """

    def __init__(self, rewards: Sequence[Reward], names: Sequence[str] | None = None):
        if not rewards:
            raise ValueError("found an empty list of rewards, wanted at least one")
        self.rewards = list(rewards)
        prefixes = [""] * len(self.rewards) if names is None else [f"{name}: " for name in names]
        self.head_names = _numbered([f"{prefix}{name}" for prefix, reward in zip(prefixes, self.rewards, strict=True) for name in head_names(reward)])

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
                raise ValueError(
                    f"reward {names[0]!r} returned {table.shape[1]} scores a response; among several rewards it must return one, or name them in head_names"
                )
            columns.append(table.expand(-1, len(names)))
        return torch.cat(columns, dim=1).tolist()


def as_reward(reward: Any) -> Reward:
    """Make a callable `(prompts, responses) -> scores` of what a user gives as the reward.

    That is such a callable, a pair (sequence classifier, tokenizer), the name or path of a sequence classifier, or a list of these, or a
    dictionary of these by name, whose scores become several heads. TypeError for anything else.
    """
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
    raise TypeError(
        "reward must be a callable (prompts, responses) -> scores, a pair (model, tokenizer), the name of a sequence classifier, or a list of these; "
        f"found {type(reward).__name__}"
    )


def _numbered(names: list[str]) -> list[str]:
    """Names that differ: of equal ones all but the first get a number."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return numbered
