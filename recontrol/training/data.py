"""Rollouts as training sees them: split by prompt, in parts that fit memory, with standardised rewards."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from recontrol.ambient import shielded
from recontrol.checks import first_few
from recontrol.data.batches import MemoryRollouts, ScoredResponses
from recontrol.data.rollouts import Rollouts
from recontrol.training.distributed import Processes

logger = logging.getLogger(__name__)

# Tokens in one forward call. It bounds memory, and splits a mini-batch between responses without changing its gradient.
TOKENS_AT_ONCE = 8192
# The paper's batch; small data get smaller ones, or one pass over them would be a handful of updates.
LARGEST_BATCH, MINIBATCHES = 512, 20
# From the number of a batch to its responses.
Make = Callable[[int], ScoredResponses]


@dataclass
class TrainingData:
    """What to train on, `held_in` of `rollouts`, or the batches `held_in` of what `make` samples with the settings `online`; `held_out` of `rollouts` validate.

    `rewards`, (responses, num_heads), in the dtype of the weights, say in what unit V counts; with `normalise_rewards` it stays in that unit. `no_states`
    are (0, hidden_size), of the dtype of states.
    """

    processes: Processes
    rollouts: Rollouts
    held_in: Tensor
    held_out: Tensor
    rewards: Tensor
    normalise_rewards: bool
    no_states: Tensor
    provenance: dict[str, Any]
    online: dict[str, Any] | None = None
    make: Make | None = None

    def in_epoch(self, epoch: int, units: Tensor) -> Tensor:
        """The numbers of responses, prompts or batches in an epoch, which is a pass over the prompts: each has other batches."""
        return units if self.online is None else units + epoch * len(units)

    def fetch(self, batch: Tensor) -> tuple[Rollouts, Tensor]:
        """Where the responses of a mini-batch are, and their indices there."""
        if self.make is None:
            return self.rollouts, batch
        # What training reads of rollouts, a batch in memory has too.
        rollouts = cast(Rollouts, MemoryRollouts(self.make(int(batch)).batch()))
        return rollouts, torch.arange(len(rollouts.lengths))

    def settings(self, labels: tuple[Tensor, ...]) -> dict[str, Any]:
        """What the result depends on beside the config; what that says of mini-batches and of the split has no meaning with `online`."""
        found = digest(self.rollouts, *labels) if self.rollouts is not None else None
        if self.online is None:
            return {"rollouts": found}
        online = {name: entry for name, entry in self.online.items() if name not in ("base_model", "made_with", "tokenizer", "reward_sha256")}
        return {"online": online, "reward_sha256": self.online["reward_sha256"], "validation": found, "batch_size": None, "validation_fraction": 0.0}


@shielded()
def stored(
    rollouts: Rollouts, processes: Processes, fraction: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32, normalise_rewards: bool = False
) -> TrainingData:
    """Rollouts, a fraction of whose prompts is held out."""
    if not len(rollouts):
        raise ValueError(f"{rollouts.path} has no responses to train on")
    check_rewards(rollouts)
    held_in, held_out = split_by_prompt(rollouts.groups, fraction, seed)
    counts = {"responses": len(rollouts), "tokens": rollouts.num_tokens, "trained_on": len(held_in), "held_out": len(held_out)}
    provenance, rewards = {**origin(rollouts.manifest), "data": counts}, rollouts.rewards.to(dtype)[held_in]
    no_states = torch.empty(0, rollouts.hidden_size, dtype=getattr(torch, rollouts.manifest["dtype"]))
    return TrainingData(processes, rollouts, held_in, held_out, rewards, normalise_rewards, no_states, provenance)


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

    def apply(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations, in the dtype of the statistics."""
        return (rewards.to(self.mean) - self.mean) / self.scale

    def undo(self, values: Tensor) -> Tensor:
        """Values in the unit of the reward, in their own dtype."""
        return values * self.scale.to(values) + self.mean.to(values)


def split_by_prompt(groups: Tensor, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the responses to train on and of those held out, in rising order: whole prompts, at least one on each side if the fraction is not 0."""
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
    bad: list[int] = []
    for part in parts(torch.arange(len(rollouts)), rollouts.lengths):
        states, lengths, _ = rollouts.batch(part)
        bad += part.repeat_interleave(lengths)[~states.isfinite().all(1)].unique().tolist()
    if bad:
        raise ValueError(f"hidden states must be finite, found NaN or infinite ones in responses {first_few(bad)} of {rollouts.path}")


def digest(rollouts: Rollouts, *tables: Tensor) -> str:
    """Identifies rollouts without reading all states: lengths, rewards and prompts of all responses, the first and last one's states, and tables."""
    found = sha256(str((rollouts.hidden_size, rollouts.manifest["dtype"])).encode())
    for tensor in (rollouts.lengths, rollouts.rewards, rollouts.groups, *tables):
        found.update(tensor.contiguous().numpy().tobytes())
    found.update(rollouts.batch([0, len(rollouts) - 1])[0].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
