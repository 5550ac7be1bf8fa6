"""Log-probabilities of responses under the uncontrolled model, and KL to it, token by token."""

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.decoding.divergence import divergence


class Likelihood(NamedTuple):
    """One response under the uncontrolled model, summed over its tokens.

    Attributes:
        nll: -sum_t log p0(y_t | prompt, y_<t), in nats.
        kl: sum_t KL(p(. | prompt, y_<t) || p0(. | prompt, y_<t)), in nats; None where p was not recorded.
    """

    nll: float
    kl: float | None


class NextTokenRecorder(LogitsProcessor):
    """Records the distribution of each token before temperature and the like; goes after all other processors of a method.

    `steps` has (rows, vocabulary) log-probabilities, float32, for each decode step; `seconds` is the time that the recording took.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record, and return the scores unchanged."""
        start = time.perf_counter()
        # On the host, where there is room for a whole batch; the copy waits for the device, so the clock is right.
        self.steps.append(scores.float().log_softmax(-1).cpu())
        self.seconds += time.perf_counter() - start
        return scores

    def row(self, index: int, tokens: int) -> Tensor:
        """(tokens, vocabulary), the distributions that the first tokens of a row were sampled from."""
        return torch.stack([step[index] for step in self.steps[:tokens]])


@torch.no_grad()
def likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[str], token_ids: Sequence[Sequence[int]], recorder: NextTokenRecorder | None = None, *, batch_size: int = 16
) -> list[Likelihood]:
    """Negative log-likelihood of each response under the uncontrolled model, and with the recorder of their generation, as one batch, the KL.

    The sum over tokens of KL(p || p0) along sampled responses is an unbiased estimate of the KL between the distributions of whole responses, for
    sampling at temperature 1 without truncation, and has less variance than the log-ratio. Token y_t belongs to the logits at the position before it.
    """
    found: list[Likelihood] = [Likelihood(0.0, None if recorder is None else 0.0)] * len(token_ids)
    for index, logits in _response_logits(model, tokenizer, prompts, token_ids, batch_size):
        ids = torch.tensor(list(token_ids[index]), device=logits.device)
        wide = logits.double()
        nll = float((wide.logsumexp(-1) - wide.gather(1, ids[:, None])[:, 0]).sum())
        kl = None
        if recorder is not None:
            kl = float(divergence(recorder.row(index, len(ids)).to(logits.device), logits).double().sum())
        found[index] = Likelihood(nll, kl)
    return found


def _response_logits(model: Any, tokenizer: Any, prompts: Sequence[str], token_ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """(index, (tokens, vocabulary) logits that sample its tokens) of each response that has a token, in batches of similar length."""
    if len(prompts) != len(token_ids):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(token_ids)} responses")
    rows = [(index, tokenizer(prompt).input_ids, list(ids)) for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)) if len(ids)]
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    for start in range(0, len(rows), batch_size):
        yield from _logits(model, rows[start : start + batch_size])


def _logits(model: Any, rows: Sequence[tuple[int, list[int], list[int]]]) -> Iterator[tuple[int, Tensor]]:
    texts = [prompt + ids for _, prompt, ids in rows]
    width = max(map(len, texts))
    # Right padding: no token of a response attends to it, and positions need no correction.
    inputs = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
    first = min(len(prompt) for _, prompt, _ in rows) - 1
    # With a large vocabulary the logits of prompts would be most of the memory.
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, **options).logits[:, first - width :]
    for scores, (index, prompt, ids) in zip(logits, rows, strict=True):
        start = len(prompt) - 1 - first
        yield index, scores[start : start + len(ids)]
