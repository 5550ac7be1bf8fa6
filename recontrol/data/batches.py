"""What passes between those who make rollouts, those who keep them, and those who train on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RolloutBatch(NamedTuple):
    """Some responses, as training reads them: from disk (`Rollouts.batch`) or straight from the model (`OnlineRollouts`).

    Tensors:
        states: (tokens, hidden_size), packed one response after the other; row t of a response is the state whose logits sampled its token t.
        lengths, rewards: (responses,), int64, tokens of each response, at least 1; and (responses, num_heads), float32.
    """

    states: Tensor
    lengths: Tensor
    rewards: Tensor


class MemoryRollouts:
    """A batch in memory, read as `Rollouts` are: some of its responses at a time."""

    def __init__(self, batch: RolloutBatch):
        self._states = batch.states.split(batch.lengths.tolist())
        self.lengths, self.rewards, self.num_heads = batch.lengths, batch.rewards, batch.rewards.shape[1]

    def batch(self, indices: Sequence[int] | Tensor) -> RolloutBatch:
        """Some responses, as `Rollouts.batch` returns them."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        return RolloutBatch(torch.cat([self._states[index] for index in indices.tolist()]), self.lengths[indices], self.rewards[indices])


@dataclass
class ScoredResponses:
    """All that a shard keeps of some responses: packed states and tokens, entry t sampled from row t, their records, and how many were dropped, and why."""

    states: Tensor
    token_ids: Tensor
    lengths: list[int]
    records: list[dict[str, Any]]
    left_out: dict[str, int]

    def batch(self) -> RolloutBatch:
        """What training reads of them."""
        heads = len(self.records[0]["reward"]) if self.records else 1
        rewards = torch.tensor([record["reward"] for record in self.records], dtype=torch.float32, device="cpu").reshape(-1, heads)
        return RolloutBatch(self.states, torch.tensor(self.lengths, dtype=torch.int64, device="cpu"), rewards)
