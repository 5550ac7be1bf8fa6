"""Padded batches: a fixed set of prompts is decoded to the end by `model.generate`, then the next."""

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from recontrol.generation.requests import Options, Request
from recontrol.generation.steering import Rows, Steering

# What the thread that decodes says last.
_DONE = None


def tokens(
    model: Any, requests: Sequence[Request], batches: Sequence[Sequence[int]], steering: Steering, options: Options
) -> Generator[tuple[int, int | None], None, None]:
    """Generate batch by batch.

    Args:
        model: a causal language model.
        requests: the prompts.
        batches: which prompts go together.
        steering: attached hooks.
        options: how responses are generated.

    Yields:
        (prompt, token) as tokens come, and (prompt, None) when its response is finished.

    Raises:
        What `model.generate` raises.
    """
    for batch in batches:
        yield from _batch(model, batch, [requests[index].ids for index in batch], steering, options)


def _batch(model: Any, batch: Sequence[int], ids: list[list[int]], steering: Steering, options: Options) -> Generator[tuple[int, int | None], None, None]:
    width = max(map(len, ids))
    # On the left, so that the last position is the prompt's last for every row.
    inputs = torch.tensor([[options.pad_id] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    # `generate` returns when all is done, so it runs in a thread of its own, and hands over each token when there is one.
    found: queue.SimpleQueue[tuple[int, int | None] | BaseException | None] = queue.SimpleQueue()
    watcher = _Watcher(batch, found, options)
    thread = threading.Thread(target=_run, args=(model, inputs, mask, watcher, options), daemon=True)
    steering.source = lambda kwargs: watcher.rows() if threading.current_thread() is thread else None
    thread.start()
    try:
        while (entry := found.get()) is not _DONE:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        watcher.abandoned = True
        thread.join()


def _run(model: Any, inputs: Tensor, mask: Tensor, watcher: "_Watcher", options: Options) -> None:
    try:
        with torch.no_grad():
            model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=options.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([watcher]),
                # Of rows that change from step to step no compiled code knows.
                **{"pad_token_id": options.pad_id, "disable_compile": True, **options.generation},
            )
    except BaseException as error:
        watcher.found.put(error)
    finally:
        watcher.found.put(_DONE)


class _Watcher(StoppingCriteria):
    """Hands over the new tokens of the rows of one batch, and knows which rows are not finished.

    Args:
        batch: the prompt of each row.
        found: where the tokens go.
        options: when a row is finished.
    """

    def __init__(self, batch: Sequence[int], found: "queue.SimpleQueue[Any]", options: Options):
        self.batch = list(batch)
        self.found = found
        self.options = options
        self.abandoned = False
        self.live = list(range(len(batch)))
        self._new: list[list[int]] = [[] for _ in batch]

    def rows(self) -> Rows:
        """The rows that are not finished, and whose they are."""
        return Rows([self.batch[row] for row in self.live], self.live, last=True)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done: (rows,), bool."""
        newest = input_ids[:, -1].tolist()
        live = []
        for row in self.live:
            new = self._new[row]
            new.append(newest[row])
            self.found.put((self.batch[row], newest[row]))
            stopped = self.options.ends is not None and self.options.ends(new)
            if newest[row] in self.options.eos_ids or len(new) == self.options.max_new_tokens or stopped:
                self.found.put((self.batch[row], None))
            else:
                live.append(row)
        self.live = live
        kept = [] if self.abandoned else live
        done = torch.ones(len(self.batch), dtype=torch.bool)
        done[kept] = False
        return done.to(input_ids.device)
