"""Padded batches: a fixed set of prompts is decoded to the end by `model.generate`, then the next."""

import functools
import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from recontrol.ambient import carried
from recontrol.decoding.batches import left_padded
from recontrol.decoding.hooks import input_device
from recontrol.generation.request_editing import RequestEditing, Rows
from recontrol.generation.requests import BatchDecoding, Tokens

logger = logging.getLogger("recontrol")


def tokens(model: Any, prompts: Sequence[list[int]], batches: Sequence[Sequence[int]], editing: RequestEditing, decoding: BatchDecoding) -> Tokens:
    """Generate batch by batch."""
    for batch in batches:
        watcher = _Watcher(batch, decoding)
        # `generate` returns when all is done, so it runs in a thread of its own, and hands over each token when there is one; None comes last.
        thread = threading.Thread(target=carried(_run), args=(model, [prompts[index] for index in batch], watcher, decoding), daemon=True)
        editing.source = functools.partial(_rows, watcher, thread)
        thread.start()
        try:
            while (entry := watcher.found.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry
        finally:
            watcher.abandoned = True
            thread.join()


def _rows(watcher: "_Watcher", thread: threading.Thread, given: dict[str, Any]) -> Rows | None:
    """The rows that are not finished, and whose they are; other threads' calls have none."""
    return Rows([watcher.batch[row] for row in watcher.live], watcher.live, last=True) if threading.current_thread() is thread else None


def _run(model: Any, ids: list[list[int]], watcher: "_Watcher", decoding: BatchDecoding) -> None:
    try:
        inputs, mask = left_padded(ids, decoding.pad_id, input_device(model))
        with torch.no_grad():
            model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=decoding.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([watcher]),
                # Compiled code knows nothing of rows that change from step to step.
                **{"pad_token_id": decoding.pad_id, "disable_compile": True, **decoding.options},
            )
        if watcher.live and not watcher.abandoned:
            logger.warning("%d responses are cut where model.generate ended early (max_time, or the like)", len(watcher.live))
            for row in watcher.live:
                watcher.found.put((watcher.batch[row], None))
    except BaseException as error:
        watcher.found.put(error)
    finally:
        watcher.found.put(None)


class _Watcher(StoppingCriteria):
    """Puts the new tokens of the rows of one batch into a queue, and knows which rows are not finished."""

    def __init__(self, batch: Sequence[int], decoding: BatchDecoding):
        self.batch, self.decoding, self.abandoned = batch, decoding, False
        self.found: queue.SimpleQueue[tuple[int, int | None] | BaseException | None] = queue.SimpleQueue()
        self.live = list(range(len(batch)))
        self._new: list[list[int]] = [[] for _ in batch]

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
        going = set() if self.abandoned else set(live)
        return torch.tensor([row not in going for row in range(len(self.batch))], device=input_ids.device)
