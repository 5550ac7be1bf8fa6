"""From generated tokens to responses: where a response ends, and what its text is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from recontrol.decoding.config import listed_stop_strings as listed_stop_strings

# Enough of the prompt for a tokenizer that drops the space before the first word of a text.
CONTEXT_TOKENS = 4


@dataclass
class Response:
    """One response.

    Attributes:
        token_ids: the tokens kept; the end-of-sequence token, if there is one, is the last.
        text: what the tokens add to the prompt's text, without special tokens.
        finish: "eos", "length" (cut at the most tokens allowed) or "stop" (cut before a stop string).
    """

    token_ids: list[int]
    text: str
    finish: str


def make_response(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int], eos_ids: Collection[int], stop_strings: Sequence[str] = ()) -> Response:
    """Cut new tokens after the first end-of-sequence token, and before the first token that touches a stop string.

    The prompt is without padding; the new tokens may have padding behind them. If a stop string begins in the middle of a token, that token goes too.
    """
    ids = list(new_ids)
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    if end is not None:
        ids = ids[: end + 1]
    kept = _count_before_stop(tokenizer, prompt_ids, ids, stop_strings)
    finish = "stop" if kept is not None else "length" if end is None else "eos"
    ids = ids[:kept]
    return Response(ids, decode_after(tokenizer, prompt_ids, ids, skip_special_tokens=True), finish)


def decode_after(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text that new tokens add to a prompt. Decoded alone, they would lose the first space with some tokenizers."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before, whole = tokenizer.decode(context, **options), tokenizer.decode([*context, *new_ids], **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new_ids), **options)


def _count_before_stop(tokenizer: Any, prompt_ids: Sequence[int], ids: list[int], stop_strings: Sequence[str]) -> int | None:
    """How many tokens lie wholly before the first stop string; None if there is no stop string."""
    text = decode_after(tokenizer, prompt_ids, ids, skip_special_tokens=False)
    found = [place for place in (text.find(stop) for stop in stop_strings) if place >= 0]
    if not found:
        return None
    for count in range(len(ids), 0, -1):
        before = decode_after(tokenizer, prompt_ids, ids[:count], skip_special_tokens=False)
        # A prefix that ends inside a character decodes to something else and does not count.
        if len(before) <= min(found) and text.startswith(before):
            return count
    return 0


class StopStrings(StoppingCriteria):
    """Ends the generation of a row once its new text holds a stop string; the first `prompt_length` positions are the prompt."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], prompt_length: int):
        self.tokenizer = tokenizer
        self.stop_strings = list(stop_strings)
        self.prompt_length = prompt_length
        # A token is at least a byte, so no stop string that ends in the newest token begins further back.
        self.window = max(len(stop.encode()) for stop in self.stop_strings) + CONTEXT_TOKENS

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done: (rows,), bool."""
        new = input_ids[:, self.prompt_length :]
        return torch.tensor([self.ends(row) for row in new.tolist()], device=input_ids.device)

    def ends(self, new_ids: list[int]) -> bool:
        """Whether the newest of these tokens of a response completes a stop string."""
        return self._holds(new_ids[-self.window :]) and self._holds(new_ids)

    def _holds(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stop_strings)
