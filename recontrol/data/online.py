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

        batch number n of pass p is that of seed + p * (batches of a pass) + n

    The first pass has, bit for bit, the shards that `collect` would write with the same arguments, and later passes have other responses to the
    same prompts. What a batch holds depends on its number alone. While an iterator is in use, the model is in evaluation mode.

    Args:
        model: a causal language model, on any device, of any dtype.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        reward: as for `collect`.
        options: those of `collect`, except `storage` and `progress`: max_new_tokens, num_samples, batch_size, cache_budget, seed, ...

    Attributes:
        settings: all that the batches depend on, for the provenance of what is trained on them.
        opened: gets the model ready inside a block, for a function from the number of a batch, from 0 on, to its responses.
        hidden_size, dtype: of a state.

    Raises:
        TypeError, ValueError: as for `collect`.
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
        """The batches from number `start` to before `stop`, over as many passes as that takes; without end if `stop` is None.

        A batch of which stop strings left no response is passed over.
        """
        return (scored.batch() for scored in self.responses(start, stop) if scored.records)

    def responses(self, start: int = 0, stop: int | None = None) -> Iterator[ScoredResponses]:
        """As `batches`, with the texts and tokens of the responses."""
        with self.opened() as make:
            yield from map(make, itertools.count(start) if stop is None else range(start, stop))
