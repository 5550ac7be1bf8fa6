"""How far a method moves a language model: log-probabilities of responses, and KL to the uncontrolled model, token by token."""

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
    """Keeps the distribution that each token is sampled from, before temperature and the like; to be put after all other processors of a method.

    Attributes:
        steps: one (rows, vocabulary) tensor of log-probabilities, float32, for each decode step.
        seconds: what the recording took, so that it can be left out of what the method takes.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record; the scores stay as they are."""
        start = time.perf_counter()
        # On the host, where a whole batch of them finds room; this waits for the device, so the clock is right.
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
    """Score responses by the uncontrolled model, and compare the distributions that they were sampled from with its own.

    The sum over tokens of KL(p || p0) along sampled responses is an unbiased estimate of KL between the distributions of whole responses, when these
    are sampled from p at temperature 1 without truncation, and varies less than the log-ratio does. It is defined for other ways of decoding as well.

    Time index: token y_t and its distributions belong to the position before it; those of y_0 to the last prompt position.

    Args:
        model: the language model, in evaluation mode, nothing attached.
        tokenizer: its tokenizer.
        prompts: one a response, as the uncontrolled model is given them.
        token_ids: the tokens of each response.
        recorder: was among the logits processors when these responses were generated as one batch; None measures no KL.
        batch_size: responses in one forward call.

    Returns:
        One entry a response.

    Raises:
        ValueError: another number of prompts than responses.
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
    """(index, (tokens, vocabulary) logits that sample its tokens) of each response that has a token, those of like length together."""
    if len(prompts) != len(token_ids):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(token_ids)} responses")
    rows = [(index, tokenizer(prompt).input_ids, list(ids)) for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)) if len(ids)]
    # Rows of like length together, so that little is padded.
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    for start in range(0, len(rows), batch_size):
        yield from _logits(model, rows[start : start + batch_size])


def _logits(model: Any, rows: Sequence[tuple[int, list[int], list[int]]]) -> Iterator[tuple[int, Tensor]]:
    texts = [prompt + ids for _, prompt, ids in rows]
    width = max(map(len, texts))
    # Padded on the right, where no token of a response can see it, so that positions need no correction.
    inputs = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
    first = min(len(prompt) for _, prompt, _ in rows) - 1
    # The logits of prompts are not looked at, and with a large vocabulary they are most of the memory.
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, **options).logits[:, first - width :]
    for scores, (index, prompt, ids) in zip(logits, rows, strict=True):
        start = len(prompt) - 1 - first
        yield index, scores[start : start + len(ids)]
