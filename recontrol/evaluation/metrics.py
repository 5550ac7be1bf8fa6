"""What responses are measured by: diversity, coherence, negative log-likelihood, and bootstrap intervals of means."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recontrol.evaluation.divergence import likelihoods

# A word with its inner apostrophes, or one mark: "don't stop!!" has the tokens don't, stop, !, !.
WORD = re.compile("\\w+(?:['\u2019]\\w+)*|[^\\w\\s]")
# No word is longer; what is, is one piece repeated without a space, or a script that puts none.
LONGEST_WORD = 30
# Bootstrap resamples are drawn in blocks of at most this many indices, which bounds the memory.
BLOCK = 4_000_000


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, as they are written; what is too long for a word is split into letters."""
    return [part for word in WORD.findall(text) for part in ([word] if len(word) <= LONGEST_WORD else word)]


def rep_n(tokens: Sequence[Any], n: int) -> float:
    """The share of n-grams that repeat: rep_n = 1 - unique n-grams / n-grams.

    Args:
        tokens: words, or token ids.
        n: length of an n-gram.

    Returns:
        In [0, 1); 0 where there are fewer than n tokens, since then nothing repeats.

    Source: Kong et al. 2024, section 5 (diversity).
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(response: str | Sequence[Any]) -> float:
    """How little a response repeats itself: prod_{n=2..4} (1 - rep_n).

    A response too short for n-grams of some n loses nothing by them; one without any token has diversity 0. The released
    code counts one n-gram more than there are, which makes its figures lower: by about 3 % for a hundred words.

    Args:
        response: a text, split by `words`, or a list of tokens. Give tokens for scripts that put no spaces between words.

    Returns:
        In [0, 1]; 1 where no bigram occurs twice.

    Source: Kong et al. 2024, section 5 (diversity).
    """
    tokens = words(response) if isinstance(response, str) else list(response)
    return float(np.prod([1 - rep_n(tokens, n) for n in (2, 3, 4)])) if tokens else 0.0


def load_encoder(encoder: Any) -> Any:
    """Make a sentence encoder of a name: anything with `encode(texts) -> (texts, width)` is taken as it is.

    Args:
        encoder: an encoder, or the name or path of one for sentence-transformers.

    Raises:
        ImportError: a name was given and sentence-transformers is not installed.
        OSError: there is no such encoder.
    """
    if not isinstance(encoder, str | os.PathLike):
        return encoder
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError("coherence needs sentence-transformers: pip install 'recontrol[coherence]'") from error
    return SentenceTransformer(str(encoder))


def similarities(prompts: Sequence[str], responses: Sequence[str], encoder: Any) -> np.ndarray:
    """Cosine of the sentence embeddings of each prompt and its response: e(x) . e(y) / (|e(x)| |e(y)|).

    Args:
        prompts: one a response.
        responses: the texts; a blank one has similarity 0.
        encoder: as for `load_encoder`.

    Returns:
        (responses,), float64, in [-1, 1].

    Raises:
        ImportError: a name was given and sentence-transformers is not installed.
        ValueError: as many prompts as responses are needed.

    Source: Kong et al. 2024, section 5 (coherence).
    """
    if len(prompts) != len(responses):
        raise ValueError(f"every response needs its prompt: found {len(prompts)} prompts for {len(responses)} responses")
    if not responses:
        return np.zeros(0)
    # Several settings answer the same prompts: each text is encoded once.
    texts = list(dict.fromkeys([*prompts, *responses]))
    embeddings = np.asarray(load_encoder(encoder).encode(texts, show_progress_bar=False), dtype=np.float64)
    embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    place = {text: index for index, text in enumerate(texts)}
    cosines = np.einsum("ij,ij->i", embeddings[[place[text] for text in prompts]], embeddings[[place[text] for text in responses]])
    return np.where([bool(text.strip()) for text in responses], cosines.clip(-1, 1), 0.0)


def coherence(prompts: Sequence[str], responses: Sequence[str], encoder: Any) -> float:
    """Mean cosine of the sentence embeddings of prompt and response.

    Args:
        prompts: one a response.
        responses: the texts; a blank one counts as 0.
        encoder: a name or path for sentence-transformers, or an object with `encode(texts) -> (texts, width)`.

    Returns:
        In [-1, 1].

    Raises:
        ImportError: a name was given and sentence-transformers is not installed.
        ValueError: no responses, or another number of prompts.

    Source: Kong et al. 2024, section 5 (coherence).
    """
    if not responses:
        raise ValueError("there are no responses")
    return float(similarities(prompts, responses, encoder).mean())


def response_nll(model: Any, tokenizer: Any, prompts: Sequence[str], token_ids: Sequence[Sequence[int]], *, batch_size: int = 16) -> float:
    """Negative log-likelihood of responses under the model, in nats a token: -mean_t log p(y_t | prompt, y_<t).

    The mean is over all tokens of all responses, the end-of-sequence token included where there is one. p is the model
    as it is, at temperature 1: measure the uncontrolled model, with no controller attached.

    Time index: token y_t is scored with the logits at the position before it; y_0 with those at the last prompt position.

    Args:
        model: the language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: one a response.
        token_ids: the tokens of each response, as they were generated.
        batch_size: responses in one forward call.

    Returns:
        Nats a response token; NaN where no response has a token.

    Raises:
        ValueError: another number of prompts than responses.
    """
    found = likelihoods(model, tokenizer, prompts, token_ids, batch_size=batch_size)
    count = sum(map(len, token_ids))
    return sum(each.nll for each in found) / count if count else float("nan")


def bootstrap_interval(values: Sequence[float] | np.ndarray | Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: one number a response, finite.
        level: the share of resampled means inside, for example 0.95.
        resamples: how many times the values are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        (low, high); the same number twice for a single value, which says nothing about its spread.

    Raises:
        ValueError: no values, NaN or infinite values, a level outside (0, 1), or no resamples.
    """
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


def bootstrap_difference(
    values: Sequence[float] | np.ndarray | Tensor,
    others: Sequence[float] | np.ndarray | Tensor,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Paired percentile bootstrap interval of mean(values - others): pairs are drawn, so what a prompt adds to both cancels.

    Args:
        values: one number a prompt.
        others: one number for the same prompts, in the same order.
        level: the share of resampled means inside.
        resamples: how many times the pairs are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        (low, high); the difference is beyond chance at this level where 0 lies outside.

    Raises:
        ValueError: different counts, or as for `bootstrap_interval`.
    """
    one, other = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"a paired comparison needs as many values on both sides, found {one.shape} and {other.shape}")
    return bootstrap_interval(one - other, level, resamples, seed)
