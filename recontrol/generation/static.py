"""Padded batches: a fixed set of prompts is decoded to the end by `model.generate`, then the next."""

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from recontrol.decoding.batches import left_padded
from recontrol.generation.request_editing import RequestEditing, Rows
from recontrol.generation.requests import BatchDecoding


def tokens(
    model: Any, prompts: Sequence[list[int]], batches: Sequence[Sequence[int]], editing: RequestEditing, decoding: BatchDecoding
) -> Generator[tuple[int, int | None], None, None]:
    """Generate batch by batch; yields (prompt, token) as tokens come, and (prompt, None) when its response is finished."""
    for batch in batches:
        yield from _batch(model, batch, [prompts[index] for index in batch], editing, decoding)


def _batch(
    model: Any, batch: Sequence[int], ids: list[list[int]], editing: RequestEditing, decoding: BatchDecoding
) -> Generator[tuple[int, int | None], None, None]:
    # `generate` returns when all is done, so it runs in a thread of its own, and hands over each token when there is one; None comes last.
    found: queue.SimpleQueue[tuple[int, int | None] | BaseException | None] = queue.SimpleQueue()
    watcher = _Watcher(batch, found, decoding)
    thread = threading.Thread(target=_run, args=(model, ids, watcher, decoding), daemon=True)
    editing.source = lambda given: watcher.rows() if threading.current_thread() is thread else None
    thread.start()
    try:
        while (entry := found.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        watcher.abandoned = True
        thread.join()


def _run(model: Any, ids: list[list[int]], watcher: "_Watcher", decoding: BatchDecoding) -> None:
    try:
        inputs, mask = left_padded(ids, decoding.pad_id, model.device)
        with torch.no_grad():
            model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=decoding.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([watcher]),
                # Compiled code knows nothing of rows that change from step to step.
                **{"pad_token_id": decoding.pad_id, "disable_compile": True, **decoding.options},
            )
    except BaseException as error:
        watcher.found.put(error)
    finally:
        watcher.found.put(None)


class _Watcher(StoppingCriteria):
    """Puts the new tokens of the rows of one batch into a queue, and knows which rows are not finished."""

    def __init__(self, batch: Sequence[int], found: "queue.SimpleQueue[Any]", decoding: BatchDecoding):
        self.batch = list(batch)
        self.found = found
        self.decoding = decoding
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
            stopped = self.decoding.ends is not None and self.decoding.ends(new)
            if newest[row] in self.decoding.eos_ids or len(new) == self.decoding.max_new_tokens or stopped:
                self.found.put((self.batch[row], None))
            else:
                live.append(row)
        self.live = live
        kept = [] if self.abandoned else live
        done = torch.ones(len(self.batch), dtype=torch.bool)
        done[kept] = False
        return done.to(input_ids.device)
