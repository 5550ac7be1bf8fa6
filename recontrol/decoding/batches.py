"""Generating responses in batches: left padding, a seed for each batch, and the wall-clock time of generation alone."""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from recontrol.checks import first_few
from recontrol.decoding.config import Decoding
from recontrol.decoding.hooks import input_device
from recontrol.decoding.hooks import seeded as seeded
from recontrol.decoding.model_config import context_length, vocabulary_size
from recontrol.decoding.responses import Response, StopStrings, make_response

# The result must be one row of new tokens for each prompt.
REFUSED = {
    "max_length": "use max_new_tokens",
    "stop_strings": "it is an argument of its own",
    "stopping_criteria": "use stop_strings",
    "streamer": "responses come in batches",
    "return_dict_in_generate": "only tokens are returned",
}
# Long lists of prompts are measured in pieces, so that their tokens are never all in memory.
TOKENISED_AT_ONCE = 1024


@dataclass
class Batch:
    """The responses to a batch of prompts, the decode steps of the longest row (at least 1), and the seconds that `model.generate` took, prefill included."""

    responses: list[Response]
    steps: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens kept, over all rows."""
        return sum(len(response.token_ids) for response in self.responses)


def generate_batch(model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding | None = None, **keywords: Any) -> Batch:
    """Respond to one batch of prompts with the model as it is, under control if a controller is attached; `keywords` as for `Decoding.of`."""
    decoding = Decoding.of(decoding, **keywords)
    check_options(decoding.options)
    if not prompts:
        raise ValueError("there are no prompts")
    with seeded(decoding.seed), evaluation_mode(model):
        batch = respond(model, tokenizer, prompts, list(decoding.stop_strings), {**decoding.options, "max_new_tokens": decoding.max_new_tokens})
    if len(batch.responses) != len(prompts):
        raise ValueError(f"found {len(batch.responses)} responses to {len(prompts)} prompts, wanted one each: leave num_return_sequences at 1")
    return batch


def respond(model: Any, tokenizer: Any, prompts: Sequence[str], stop_strings: list[str], options: dict[str, Any]) -> Batch:
    """Run `model.generate` in the caller's mode and with the caller's generators; row r responds to prompt r // num_return_sequences."""
    ids, device = tokenizer(list(prompts)).input_ids, input_device(model)
    check_tokens(model, ids)
    padding = padding_token(tokenizer, {})
    options = {"pad_token_id": padding, **greedy_unless_asked(options), **options, "return_dict_in_generate": False}
    inputs, mask = left_padded(ids, padding, device)
    width = inputs.shape[1]
    if stop_strings:
        options["stopping_criteria"] = StoppingCriteriaList([StopStrings(tokenizer, stop_strings, width)])
    # What was queued on an accelerator is finished before the clock is read.
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    with torch.no_grad():
        wait()
        start = time.perf_counter()
        output = model.generate(input_ids=inputs, attention_mask=mask, **options)
        wait()
        seconds = time.perf_counter() - start
    new = output[:, width:].tolist()
    samples = max(1, len(new) // len(ids))
    eos_ids = eos_tokens(model, options)
    responses = [make_response(tokenizer, ids[row // samples], tokens, eos_ids, stop_strings) for row, tokens in enumerate(new)]
    return Batch(responses, max(1, len(new[0])), seconds)


def left_padded(ids: Sequence[Sequence[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids as (rows, tokens) and their mask, 0 at padding: on the left, so that the last position is the prompt's last for every row."""
    width = max(map(len, ids))
    inputs = torch.tensor([[padding] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return inputs, mask


def greedy_unless_asked(options: dict[str, Any]) -> dict[str, Any]:
    """{"do_sample": False}, unless a generation config is given, which decides on sampling."""
    return {} if "generation_config" in options else {"do_sample": False}


def check_options(generation_kwargs: Mapping[str, Any], refused: Mapping[str, str] = REFUSED) -> None:
    """Refuse options of `generate` that do not go with batches of responses; `refused` has the reason or what to do instead."""
    for name, reason in refused.items():
        if generation_kwargs.get(name) is not None:
            raise ValueError(f"{name}={generation_kwargs[name]!r} is not taken here: {reason}")


def check_lengths(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, max_prompt_tokens: int | None = None) -> None:
    """Refuse, before any work is done, prompts that leave no room for the response in the model's context, or are longer than `max_prompt_tokens`."""
    others = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if others or isinstance(prompts, str):
        found = f"{type(prompts[others[0]]).__name__} at {first_few(others)}" if others else f"one text, {prompts[:40]!r}"
        raise TypeError(f"prompts must be a list of texts, found {found}")
    if not prompts:
        raise ValueError("there are no prompts")
    lengths: list[int] = []
    for start in range(0, len(prompts), TOKENISED_AT_ONCE):
        ids = tokenizer(list(prompts[start : start + TOKENISED_AT_ONCE])).input_ids
        check_tokens(model, ids, start)
        lengths += map(len, ids)
    check_token_counts(model, lengths, max_new_tokens, max_prompt_tokens)


def check_tokens(model: Any, rows: Sequence[Sequence[int]], first: int = 0, what: str = "prompts") -> None:
    """Refuse tokens that the model does not have, such as those added to a tokenizer alone; `first` is the number of the first row."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None) or vocabulary_size(model.config)
    if count is None:
        return
    ends = [(place, token) for place, row in enumerate(rows, first) for token in sorted({min(row, default=0), max(row, default=0)})]
    wrong = [f"{place} (token {token})" for place, token in ends if not 0 <= token < count]
    if wrong:
        raise ValueError(f"{what} have tokens that the model does not have, it knows 0 to {count - 1}: {first_few(wrong)}")


def check_token_counts(model: Any, lengths: Sequence[int], max_new_tokens: int, max_prompt_tokens: int | None = None) -> None:
    """The same for prompts whose numbers of tokens are known."""
    empty = [index for index, length in enumerate(lengths) if not length]
    if empty:
        raise ValueError(f"{len(empty)} prompts have no tokens: {first_few(empty)}")
    context = context_length(model.config)
    room = None if context is None else context - max_new_tokens
    complaints = f"leave no room for {max_new_tokens} new tokens in a context of {context}", f"are longer than {max_prompt_tokens} tokens"
    for limit, complaint in zip((room, max_prompt_tokens), complaints, strict=True):
        too_long = [f"{index} ({length} tokens)" for index, length in enumerate(lengths) if limit is not None and length > limit]
        if too_long:
            raise ValueError(f"{len(too_long)} prompts {complaint}: {first_few(too_long)}")


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode inside, module by module back as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def effective(model: Any, options: dict[str, Any], name: str) -> Any:
    """What `generate` will use for an option: that of the call, else that of the generation config given, else that of the model's."""
    given = getattr(options.get("generation_config"), name, None)
    return options[name] if name in options else getattr(model.generation_config, name, None) if given is None else given


def padding_token(tokenizer: Any, options: Mapping[str, Any]) -> int:
    """What fills the places before a prompt and after a response that has ended."""
    return next(token for token in (options.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def eos_tokens(model: Any, options: dict[str, Any]) -> set[int]:
    """The end-of-sequence tokens that `generate` stops at, with these options."""
    eos = effective(model, options, "eos_token_id")
    return set(torch.as_tensor([] if eos is None else eos, device="cpu").reshape(-1).tolist())
