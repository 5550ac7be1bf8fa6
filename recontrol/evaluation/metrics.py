"""Metrics of responses: diversity, coherence, and bootstrap intervals of means."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recontrol.checks import required

# A word with its inner apostrophes, or one mark: "don't stop!!" has the tokens don't, stop, !, !.
WORD = re.compile("\\w+(?:['\u2019]\\w+)*|[^\\w\\s]")
# A longer one is a piece repeated without a space, or a script without spaces.
LONGEST_WORD = 30
# Bootstrap resamples are drawn in blocks of at most this many indices, which bounds the memory.
BLOCK = 4_000_000

Numbers = Sequence[float] | np.ndarray | Tensor


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks; what is longer than `LONGEST_WORD` is split into letters."""
    return [part for word in WORD.findall(text) for part in ([word] if len(word) <= LONGEST_WORD else word)]


def rep_n(tokens: Sequence[Any], n: int) -> float:
    """The share of n-grams that repeat, rep_n = 1 - unique n-grams / n-grams; 0 where there are fewer than n tokens."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(response: str | Sequence[Any]) -> float:
    """prod_{n=2..4} (1 - rep_n), in [0, 1], of a text, split by `words`, or of a list of tokens; 0 without any token (Kong et al. 2024, section 5).

    The released code counts one n-gram more than there are, so its figures are lower: by about 3 % for a hundred words.
    """
    tokens = words(response) if isinstance(response, str) else list(response)
    return float(np.prod([1 - rep_n(tokens, n) for n in (2, 3, 4)])) if tokens else 0.0


def load_encoder(encoder: Any) -> Any:
    """The sentence encoder of a name or path for sentence-transformers; an object with `encode(texts) -> (texts, width)` is returned as it is."""
    if not isinstance(encoder, str | os.PathLike):
        return encoder
    return required("sentence_transformers", "coherence").SentenceTransformer(str(encoder))


def similarities(prompts: Sequence[str], responses: Sequence[str], encoder: Any) -> np.ndarray:
    """e(x) . e(y) / (|e(x)| |e(y)|), e the sentence embeddings: (responses,), float64; 0 for a blank response (coherence, Kong et al. 2024, section 5)."""
    if len(prompts) != len(responses):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(responses)} responses")
    if not responses:
        return np.zeros(0)
    # Several settings answer the same prompts: each text is encoded once.
    texts, places = np.unique([*prompts, *responses], return_inverse=True)
    embeddings = np.asarray(load_encoder(encoder).encode(texts.tolist(), show_progress_bar=False), dtype=np.float64)
    embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    cosines = (embeddings[places[: len(prompts)]] * embeddings[places[len(prompts) :]]).sum(1)
    return np.where([bool(text.strip()) for text in responses], cosines.clip(-1, 1), 0.0)


def bootstrap_interval(values: Numbers, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high), percentile bootstrap interval of the mean at this level; a single value gives the same number twice."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"bootstrap needs at least one value in one dimension, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"bootstrap needs finite values, found {array[~np.isfinite(array)][0]} at {int(np.flatnonzero(~np.isfinite(array))[0])}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be inside (0, 1) and resamples at least 1, found {level} and {resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // array.size)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = np.concatenate([array[generator.integers(0, array.size, (size, array.size))].mean(1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_difference(values: Numbers, others: Numbers, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Paired percentile bootstrap interval of mean(values - others), one number a prompt each: pairs are drawn, so the effect of a prompt cancels."""
    one, other = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"a paired comparison needs as many values on both sides, found {one.shape} and {other.shape}")
    return bootstrap_interval(one - other, level, resamples, seed)
