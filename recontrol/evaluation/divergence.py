"""Log-probabilities of responses under the uncontrolled model, and KL to it, token by token."""

import inspect
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.decoding.divergence import divergence


class Likelihood(NamedTuple):
    """A response under the uncontrolled model, in nats: -sum_t log p0(y_t), and sum_t KL(p_t || p0_t) where p was recorded, else None."""

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
    if len(prompts) != len(token_ids):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(token_ids)} responses")
    found: list[Likelihood] = [Likelihood(0.0, None if recorder is None else 0.0)] * len(token_ids)
    rows = [(index, tokenizer(prompt).input_ids, list(ids)) for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)) if len(ids)]
    # Together with others of similar length.
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for (index, _, ids), logits in zip(batch, _logits(model, batch), strict=True):
            nll = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids, device=logits.device), reduction="sum")
            moved = None if recorder is None else divergence(recorder.row(index, len(ids)).to(logits.device), logits).double().sum()
            found[index] = Likelihood(float(nll), None if moved is None else float(moved))
    return found


def _logits(model: Any, rows: Sequence[tuple[int, list[int], list[int]]]) -> list[Tensor]:
    """Of each row (index, prompt, response) the (tokens, vocabulary) logits that sample its response."""
    texts = [prompt + ids for _, prompt, ids in rows]
    width = max(map(len, texts))
    # Right padding: no token of a response attends to it, and positions need no correction.
    inputs = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
    first = min(len(prompt) for _, prompt, _ in rows) - 1
    # With a large vocabulary the logits of prompts would be most of the memory.
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, **options).logits[:, first - width :]
    starts = [len(prompt) - 1 - first for _, prompt, _ in rows]
    return [scores[start : start + len(ids)] for scores, start, (_, _, ids) in zip(logits, starts, rows, strict=True)]
