"""Rollouts that are trained on as they are sampled, and never kept."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from recontrol.data.batches import RolloutBatch, ScoredResponses
from recontrol.data.sampling import SampledResponses
from recontrol.decoding.hooks import input_width, output_embedding


class OnlineRollouts:
    """Batches of rollouts straight from the model, of which nothing is written: `RolloutBatch`es, as `Rollouts.batch` returns them.

    The first pass has the shards that `collect` would write, bit for bit; batch n of pass p has the seed `seed + p * (batches of a pass) + n`.

    Args:
        model, tokenizer, prompts, reward: as for `collect`.
        options: those of `collect`, except `storage` and `progress`.

    `settings` is all that the batches depend on, `hidden_size` and `dtype` those of a state. Raises TypeError, ValueError: as for `collect`.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str], reward: Any, **options: Any):
        self._source = SampledResponses(model, tokenizer, prompts, reward, **options)
        self.model, self.settings, self.opened = model, self._source.settings, self._source.opened
        embedding = output_embedding(model)
        self.hidden_size = input_width(model, embedding)
        self.dtype: torch.dtype = embedding.weight.dtype  # type: ignore[assignment]

    def __len__(self) -> int:
        """Batches of one pass over the prompts."""
        return len(self._source.batches)

    def __iter__(self) -> Iterator[RolloutBatch]:
        """The batches of the first pass."""
        return self.batches(0, len(self))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[RolloutBatch]:
        """The batches from number `start` to before `stop`, without end if it is None; a batch of which stop strings left nothing is passed over."""
        return (scored.batch() for scored in self.responses(start, stop) if scored.records)

    def responses(self, start: int = 0, stop: int | None = None) -> Iterator[ScoredResponses]:
        """As `batches`, with the texts and tokens of the responses."""
        with self.opened() as make:
            yield from map(make, itertools.count(start) if stop is None else range(start, stop))
