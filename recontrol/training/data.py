"""Rollouts as training sees them: split by prompt, in parts that fit memory, with standardised rewards."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recontrol.checks import first_few
from recontrol.data.rollouts import Rollouts
from recontrol.training.distributed import Processes

logger = logging.getLogger(__name__)

# Tokens in one forward call. It bounds memory, and splits a mini-batch between responses without changing its gradient.
TOKENS_AT_ONCE = 8192
# The paper's batch; small data get smaller ones, or one pass over them would be a handful of updates.
LARGEST_BATCH = 512
MINIBATCHES = 20


class TrainingData:
    """Stored rollouts, some of whose prompts are held out.

    Attributes:
        rollouts: those trained on and those held out.
        held_in: responses to train on.
        held_out: responses to validate on.
        rewards: (len(held_in), num_heads), those trained on, in the dtype of the weights.
        states_dtype: of the states.
        normalise_rewards: whether V stays in standard deviations of the reward.
        processes: the processes that share a mini-batch.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        processes: Processes,
        *,
        validation_fraction: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        normalise_rewards: bool = False,
    ):
        if not len(rollouts):
            raise ValueError(f"{rollouts.path} has no responses to train on")
        check_rewards(rollouts)
        self.rollouts, self.processes, self.normalise_rewards = rollouts, processes, normalise_rewards
        self.held_in, self.held_out = split_by_prompt(rollouts.groups, validation_fraction, seed)
        self.rewards = rollouts.rewards.to(dtype)[self.held_in]
        self.hidden_size, self.num_heads = rollouts.hidden_size, rollouts.num_heads
        self.states_dtype: torch.dtype = getattr(torch, rollouts.manifest["dtype"])

    def units(self, epoch: int) -> Tensor:
        """What an epoch takes: responses."""
        return self.held_in

    def batch_size(self, asked: int | None, units: int) -> int:
        """Units in a mini-batch."""
        return asked or max(1, min(LARGEST_BATCH, units // MINIBATCHES))

    def fetch(self, batch: Tensor) -> tuple[Rollouts, Tensor]:
        """Where the responses of a mini-batch are, and their indices there."""
        return self.rollouts, batch

    def check(self) -> None:
        """Refuse states that are not finite."""
        check_states(self.rollouts)

    def settings(self, labels: tuple[Tensor, ...]) -> dict[str, Any]:
        """What the result depends on beside the config."""
        return {"rollouts": digest(self.rollouts, *labels)}

    def provenance(self) -> dict[str, Any]:
        """What V was trained on."""
        counts = {"responses": len(self.rollouts), "tokens": self.rollouts.num_tokens, "trained_on": len(self.held_in), "held_out": len(self.held_out)}
        return {**origin(self.rollouts.manifest), "data": counts}


def origin(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of rollouts as the provenance of a value function has it."""
    named = {name: manifest.get(name) for name in ("base_model", "reward")}
    return {**named, "rollouts": {name: entry for name, entry in manifest.items() if name not in named}}


@dataclass(frozen=True)
class Standardisation:
    """Counts rewards in standard deviations, `scale`, from their mean; both are (num_heads,)."""

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
        """Leaves numbers as they are."""
        return cls(torch.zeros(num_heads, dtype=dtype), torch.ones(num_heads, dtype=dtype))

    def apply(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations, in the dtype of the statistics."""
        return (rewards.to(self.mean) - self.mean) / self.scale

    def undo(self, values: Tensor) -> Tensor:
        """Values in the unit of the reward, in their own dtype."""
        return values * self.scale.to(values) + self.mean.to(values)


def split_by_prompt(groups: Tensor, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the responses to train on and of those held out, in rising order; a prompt has all its responses on one side.

    At least one prompt is on each side, unless `validation_fraction` is 0.
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


def read(rollouts: Rollouts, indices: Tensor, standardisation: Standardisation) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """States, standardised rewards and lengths of some responses, some thousand tokens at a time."""
    for part in parts(indices, rollouts.lengths):
        states, lengths, rewards = rollouts.batch(part)
        yield states, standardisation.apply(rewards), lengths


def check_rewards(rollouts: Rollouts) -> None:
    """Refuse rewards that are not finite, and name the responses."""
    bad = (~rollouts.rewards.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"rewards must be finite, found others in responses {first_few(bad.tolist())}")


def check_states(rollouts: Rollouts) -> None:
    """Read everything once before training, and name responses whose states are not finite: a NaN found in epoch 50 would be found too late."""
    bad = []
    for part in parts(torch.arange(len(rollouts)), rollouts.lengths):
        states, lengths, _ = rollouts.batch(part)
        if not (finite := states.isfinite().all(1)).all():
            bad.append(part.repeat_interleave(lengths)[~finite].unique())
    if bad:
        raise ValueError(f"hidden states must be finite, found NaN or infinite ones in responses {first_few(torch.cat(bad).tolist())} of {rollouts.path}")


def digest(rollouts: Rollouts, *tables: Tensor) -> str:
    """Identifies rollouts without reading all states: lengths, rewards and prompts of all responses, the first and last one's states, and tables."""
    found = sha256(str((rollouts.hidden_size, rollouts.manifest["dtype"])).encode())
    for tensor in (rollouts.lengths, rollouts.rewards, rollouts.groups, *tables):
        found.update(tensor.contiguous().numpy().tobytes())
    found.update(rollouts.batch([0, len(rollouts) - 1])[0].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
