"""Re-ranking the likeliest next tokens: the common part of controlled decoding on tokens."""

from abc import abstractmethod

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import integer


class TopK(LogitsProcessor):
    """score(v) = logit(v) + bonus(v) for the k likeliest next tokens v, minus infinity for all others.

    `model.generate` calls this after repetition penalties and before temperature, top-k and top-p: a temperature divides logit and bonus.
    """

    def __init__(self, k: int):
        self.k = k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) ids so far, (rows, vocabulary) logits -> (rows, vocabulary) scores."""
        logits, candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        bonus = self.bonus(input_ids, candidates).to(device=scores.device, dtype=scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(-1, candidates, logits + bonus)

    @abstractmethod
    def bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """(rows, tokens) ids so far, (rows, k) candidates, the likeliest first -> (rows, k), added to their logits; any dtype and device."""


def check_k(k: int) -> int:
    """The number of candidates, an integer of at least 1."""
    if integer("k", k) < 1:
        raise ValueError(f"k must be 1 or more, found {k!r}")
    return int(k)
