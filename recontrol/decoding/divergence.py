"""How far one distribution of the next token is from another."""

import torch
from torch import Tensor


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(others)) in nats: two of (rows, vocabulary) -> (rows,), float32, 0 or more."""
    log_p, log_q = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    p = log_p.exp()
    # Tokens that a model rules out have logits of minus infinity in both.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp(min=0)
