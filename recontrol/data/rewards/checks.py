"""Calling a reward: what it must return, what it is called, and the fields of the texts that it is asked with."""

import string
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from recontrol.value.provenance import names_of_heads as names_of_heads

Reward = Callable[[list[str], list[str]], Any]


def reward_name(reward: Reward) -> str | list[str]:
    """A name for the manifest: one, or for a reward that names several heads a list with one a head."""
    heads = head_names(reward)
    return heads if len(heads) > 1 else heads[0]


def head_names(reward: Reward) -> list[str]:
    """One name for each score of a reward: its `head_names`, else its `name`, else what the function or class is called."""
    several = getattr(reward, "head_names", None)
    return list(map(str, several or [getattr(reward, "name", None) or getattr(reward, "__qualname__", None) or type(reward).__qualname__]))


def checked_rewards(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Call a reward and check what it returns: (responses, scores), float32, finite; ValueError names the responses where it is not."""
    scores = reward(list(prompts), list(responses))
    if isinstance(scores, Tensor):
        scores = scores.detach().float().cpu().tolist()
    if not hasattr(scores, "__iter__") or isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(f"the reward must return one score a response: found {type(scores).__name__}, wanted {len(responses)} scores")
    try:
        rows = [[_number(score) for score in (row if isinstance(row, list | tuple) or getattr(row, "ndim", None) else [row])] for row in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward must return numbers: {error}") from error
    if len(rows) != len(responses):
        raise ValueError(f"the reward must return one score a response: found {len(rows)}, wanted {len(responses)}")
    widths = [len(row) for row in rows]
    if len(set(widths)) > 1 or 0 in widths:
        raise ValueError(f"the reward must return the same number of scores for every response, at least 1; found {widths}")
    width = widths[0] if widths else 1
    named = getattr(reward, "head_names", None)
    if named and widths and width != len(named):
        raise ValueError(f"the reward names {len(named)} heads ({', '.join(map(str, named))}) and returned {width} scores a response")
    table = torch.tensor(rows, dtype=torch.float32, device="cpu").reshape(len(rows), width)
    broken = (~table.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"the reward returned NaN or infinity for responses {broken}: {[rows[index] for index in broken[:4]]}")
    return table


def _number(score: Any) -> float:
    """One score; its characters or entries would be others, and a set has no order."""
    if isinstance(score, str | bytes) or getattr(score, "ndim", None):
        raise TypeError(f"found {score!r}")
    return float(score)


def check_fields(what: str, template: str, required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Refuse with a ValueError a text that lacks a required field in braces, or has another one."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        fields = set()
    if not required <= fields <= required | optional:
        wanted = " and ".join(f"{{{name}}}" for name in sorted(required))
        raise ValueError(f"the {what} must have {wanted} in it and no other field, found {template!r}; write other braces twice")
