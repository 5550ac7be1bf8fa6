"""Re-ranking the likeliest next tokens: what controlled decoding on tokens has in common."""

from abc import abstractmethod

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import integer


class TopK(LogitsProcessor):
    """score(v) = logit(v) + bonus(v) for the k likeliest next tokens v, minus infinity for all others.

    A constant added to a row's logits changes neither their softmax nor their order, so logits and log-probabilities serve alike.
    `model.generate` puts what is given to it behind repetition penalties and the like, and before temperature, top-k and top-p, which therefore
    see the scores: a temperature divides logit and bonus.

    Args:
        k: how many tokens are candidates; all of them where the vocabulary is smaller.
    """

    def __init__(self, k: int):
        self.k = k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The new scores, (rows, vocabulary).

        Args:
            input_ids: (rows, tokens), prompts, padded on the left, and the responses so far.
            scores: (rows, vocabulary), the logits of the next token.
        """
        logits, candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        bonus = self.bonus(input_ids, candidates).to(device=scores.device, dtype=scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(-1, candidates, logits + bonus)

    @abstractmethod
    def bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """What is added to the logits of the candidates, (rows, k), of any floating-point dtype, on any device.

        Args:
            input_ids: (rows, tokens), prompts, padded on the left, and the responses so far.
            candidates: (rows, k), the likeliest tokens of each row, the likeliest first.
        """


def check_k(k: int) -> int:
    """The number of candidates as a plain int.

    Args:
        k: at least 1.

    Raises:
        TypeError, ValueError: it is no integer, or less than 1.
    """
    if integer("k", k) < 1:
        raise ValueError(f"k must be 1 or more, found {k!r}")
    return int(k)
