"""Sampling with noise that is a function of seed, prompt and position: decodings of one prompt are then comparable token by token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


def add_gumbel(scores: Tensor, prompts: Sequence[int], position: int, seed: int) -> Tensor:
    """Add noise: s + g, g_y = -log(-log(U_y)), U_y uniform: argmax_y (s_y + g_y) is a sample of softmax(s).

    The noise is drawn on the host from (seed, prompt, position), so that it is the same on every device and in every batch.

    Args:
        scores: (rows, vocabulary), after temperature and the like.
        prompts: the number of each row's prompt; rows of one prompt get the same noise.
        position: t of the token y_t that is sampled.
        seed: 0 or more.

    Returns:
        (rows, vocabulary), dtype of `scores`; what is minus infinity stays so.
    """
    noise = {prompt: np.random.default_rng([seed, prompt, position]).gumbel(size=scores.shape[-1]) for prompt in dict.fromkeys(prompts)}
    table = torch.from_numpy(np.stack([noise[prompt] for prompt in prompts]))
    return scores + table.to(dtype=scores.dtype, device=scores.device)


class GumbelNoise(LogitsProcessor):
    """Makes a greedy `model.generate` sample: y_t = argmax(s_t + g), g of `add_gumbel`. Put it last among the processors.

    Two decodings of the same prompts, under whatever control, get the same noise at the same place (common random numbers). While their
    texts agree they differ in nothing but the control, and the variance of the difference of their rewards is smaller than with independent samples.

    Args:
        prompts: the number of the prompt of each row.
        prompt_length: positions taken by the prompts, padding included.
        seed: 0 or more.
    """

    def __init__(self, prompts: Sequence[int], prompt_length: int, seed: int = 0):
        self.prompts = list(prompts)
        self.prompt_length = prompt_length
        self.seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with noise: (rows, vocabulary)."""
        return add_gumbel(scores, self.prompts, input_ids.shape[1] - self.prompt_length, self.seed)
