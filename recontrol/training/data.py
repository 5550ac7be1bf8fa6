"""Rollouts as training sees them: split by prompt, in parts that fit memory, with standardised rewards."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from recontrol.data.rollouts import Rollouts

logger = logging.getLogger(__name__)

# Tokens in one forward call. It bounds memory, and splits a mini-batch between responses without changing its gradient.
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Standardisation:
    """Counts rewards in standard deviations from their mean, head by head.

    Args:
        mean: (num_heads,).
        scale: (num_heads,), above 0.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rewards: Tensor) -> "Standardisation":
        """By mean and standard deviation of (responses, num_heads) rewards; where they do not vary, by that reward and 1."""
        # Not by the standard deviation, which for equal rewards is not 0 but the rounding of their mean.
        same = (rewards == rewards[0]).all(0)
        if same.any():
            logger.warning("all rewards of heads %s are the same: there is nothing to learn from them", same.nonzero()[:, 0].tolist())
        return cls(torch.where(same, rewards[0], rewards.mean(0)), torch.where(same, 1, rewards.std(0, correction=0)))

    @classmethod
    def none(cls, num_heads: int, dtype: torch.dtype) -> "Standardisation":
        """That leaves numbers as they are."""
        return cls(torch.zeros(num_heads, dtype=dtype), torch.ones(num_heads, dtype=dtype))

    def apply(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations, in the dtype of the statistics."""
        return (rewards.to(self.mean) - self.mean) / self.scale

    def undo(self, values: Tensor) -> Tensor:
        """Values in the unit of the reward, in their own dtype."""
        return values * self.scale.to(values) + self.mean.to(values)


def split_by_prompt(groups: Tensor, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out prompts with all their responses, so that no response to a prompt trained on is among those judged.

    Args:
        groups: (responses,), index of each response's prompt.
        validation_fraction: share of the prompts held out; at least one prompt is on each side, unless this is 0.
        seed: of the choice.

    Returns:
        Indices of the responses to train on, and of those held out, each in rising order.

    Raises:
        ValueError: there is only one prompt to split.
    """
    prompts = groups.unique()
    if validation_fraction and len(prompts) < 2:
        raise ValueError(f"found {len(prompts)} prompt, wanted at least 2 to hold one out; validation_fraction=0 trains without validation")
    count = max(1, min(len(prompts) - 1, round(validation_fraction * len(prompts)))) if validation_fraction else 0
    chosen = prompts[torch.from_numpy(np.random.default_rng(seed).permutation(len(prompts))[:count])]
    held_out = torch.isin(groups, chosen)
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def parts(indices: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    """Cut a list of responses so that no part has more than TOKENS_AT_ONCE tokens, unless it is a single response."""
    start, tokens = 0, 0
    for place, length in enumerate(lengths[indices].tolist()):
        if tokens and tokens + length > TOKENS_AT_ONCE:
            yield indices[start:place]
            start, tokens = place, 0
        tokens += length
    if len(indices):
        yield indices[start:]


def check_rewards(rollouts: Rollouts) -> None:
    """Refuse rewards that are not finite.

    Raises:
        ValueError: the responses are named.
    """
    if not rollouts.rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, found others in responses {_some((~rollouts.rewards.isfinite().all(1)).nonzero()[:, 0])}")


def check_states(rollouts: Rollouts) -> None:
    """Read everything once before training: a NaN found in epoch 50 would be found too late.

    Raises:
        ValueError: the responses are named.
    """
    bad = []
    for part in parts(torch.arange(len(rollouts)), rollouts.lengths):
        states, lengths, _ = rollouts.batch(part)
        if not (finite := states.isfinite().all(1)).all():
            bad.append(part.repeat_interleave(lengths)[~finite].unique())
    if bad:
        raise ValueError(f"hidden states must be finite, found NaN or infinite ones in responses {_some(torch.cat(bad))} of {rollouts.path}")


def digest(rollouts: Rollouts, *tables: Tensor) -> str:
    """Tells rollouts apart without reading all states: lengths, rewards and prompts of all responses, and the first and last one's states.

    Args:
        rollouts: the data.
        tables: what else tells them apart.
    """
    found = sha256(str((rollouts.hidden_size, rollouts.manifest["dtype"])).encode())
    for tensor in (rollouts.lengths, rollouts.rewards, rollouts.groups, *tables):
        found.update(tensor.contiguous().numpy().tobytes())
    found.update(rollouts.batch([0, len(rollouts) - 1])[0].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _some(numbers: Tensor) -> str:
    return ", ".join(map(str, numbers[:8].tolist())) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
