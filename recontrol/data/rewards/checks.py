"""Calling a reward: what it must return, and what it is called."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recontrol.value.provenance import names_of_heads as names_of_heads

Reward = Callable[[list[str], list[str]], Any]


def reward_name(reward: Reward) -> str | list[str]:
    """A name for the manifest: where the model is from, or what the function is called.

    Args:
        reward: a callable; its attributes `name` and `head_names`, where it has them, say more than its own name.

    Returns:
        One name; for a reward that names several heads, a list with one name a head.
    """
    heads = head_names(reward)
    return heads if len(heads) > 1 else heads[0]


def head_names(reward: Reward) -> list[str]:
    """One name for each score that a reward is known to return, at least one.

    Args:
        reward: a callable, with an attribute `head_names` if it returns several scores and says what they are.
    """
    several = getattr(reward, "head_names", None)
    if several:
        return [str(name) for name in several]
    return [str(getattr(reward, "name", None) or getattr(reward, "__qualname__", None) or type(reward).__qualname__)]


def checked_rewards(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Call a reward and check what it returns.

    Args:
        reward: (prompts, responses) -> one score, or one list of scores, a response.
        prompts: one a response.
        responses: the texts to score.

    Returns:
        (responses, scores), float32, finite.

    Raises:
        ValueError: the wrong count, lists of different lengths or of another length than the heads that the reward names, what is
            no number, NaN or infinity; the responses are named.
    """
    scores = reward(list(prompts), list(responses))
    if isinstance(scores, Tensor):
        scores = scores.detach().float().cpu().tolist()
    try:
        scores = list(scores)
    except TypeError:
        raise ValueError(f"the reward must return one score a response: found {type(scores).__name__}, wanted {len(responses)} scores") from None
    if len(scores) != len(responses):
        raise ValueError(f"the reward must return one score a response: found {len(scores)}, wanted {len(responses)}")
    try:
        rows = [[float(score) for score in (row if hasattr(row, "__len__") and getattr(row, "ndim", None) != 0 else [row])] for row in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward must return numbers: {error}") from error
    widths = {len(row) for row in rows}
    if len(widths) > 1 or 0 in widths:
        raise ValueError(f"the reward must return the same number of scores for every response, at least 1; found {[len(row) for row in rows]}")
    named = getattr(reward, "head_names", None)
    if named and widths and widths != {len(named)}:
        raise ValueError(f"the reward names {len(named)} heads ({', '.join(map(str, named))}) and returned {widths.pop()} scores a response")
    table = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), widths.pop() if widths else 1)
    broken = (~table.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"the reward returned NaN or infinity for responses {broken}: {[rows[index] for index in broken[:4]]}")
    return table
