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
    """One response: the tokens kept (the end-of-sequence token, if there is one, is the last), and what they add to the prompt's text."""

    token_ids: list[int]
    text: str
    # "eos", "length" (cut at the most tokens allowed, or at `max_time`) or "stop" (cut before a stop string).
    finish: str


def make_response(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int], eos_ids: Collection[int], stop_strings: Sequence[str] = ()) -> Response:
    """Cut new tokens, behind which may be padding, after the first end-of-sequence token, and before the first token that touches a stop string."""
    end = next((place for place, token in enumerate(new_ids) if token in eos_ids), None)
    ids = list(new_ids if end is None else new_ids[: end + 1])
    finish = "length" if end is None else "eos"
    text = decode_after(tokenizer, prompt_ids, ids, skip_special_tokens=False) if stop_strings else ""
    stops = [text.find(stop) for stop in stop_strings if stop in text]
    while stops:
        finish, before = "stop", decode_after(tokenizer, prompt_ids, ids, skip_special_tokens=False)
        # A prefix that ends inside a character decodes to something else and does not count.
        if not ids or (len(before) <= min(stops) and text.startswith(before)):
            break
        ids = ids[:-1]
    return Response(ids, decode_after(tokenizer, prompt_ids, ids, skip_special_tokens=True), finish)


def decode_after(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text that new tokens add to a prompt. Decoded alone, they would lose the first space with some tokenizers."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before, whole = tokenizer.decode(context, **options), tokenizer.decode([*context, *new_ids], **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new_ids), **options)


class StopStrings(StoppingCriteria):
    """Ends the generation of a row once its new text holds a stop string; the first `prompt_length` positions are the prompt."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], prompt_length: int):
        self.tokenizer, self.stop_strings, self.prompt_length = tokenizer, list(stop_strings), prompt_length
        # A token is at least a byte, so no stop string that ends in the newest token begins further back.
        self.window = max(len(stop.encode()) for stop in self.stop_strings) + CONTEXT_TOKENS

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done: (rows,), bool."""
        return torch.tensor([self.ends(row) for row in input_ids[:, self.prompt_length :].tolist()], device=input_ids.device)

    def ends(self, new_ids: list[int]) -> bool:
        """Whether the newest of these tokens of a response completes a stop string."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        texts = (self.tokenizer.decode(ids, **options) for ids in (new_ids[-self.window :], new_ids))
        return all(any(stop in text for stop in self.stop_strings) for text in texts)
