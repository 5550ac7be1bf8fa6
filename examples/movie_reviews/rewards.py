"""Two more scores of reviews: one to aim at beside the reward model's, and one held out to judge by."""

import functools
from collections.abc import Sequence
from typing import Any


def plainness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the mean number of letters in a word of the response; a response without a word counts as one word of six letters."""
    scores = []
    for response in responses:
        words = [word for word in ("".join(filter(str.isalpha, piece)) for piece in response.split()) if word]
        scores.append(-sum(map(len, words)) / len(words) if words else -6.0)
    return scores


def vader(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How positive VADER finds prompt and response, from -1 to 1: a lexicon and rules (Hutto and Gilbert 2014), which no part of the training has seen."""
    return [_analyser().polarity_scores(f"{prompt}{response}")["compound"] for prompt, response in zip(prompts, responses, strict=True)]


@functools.cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
