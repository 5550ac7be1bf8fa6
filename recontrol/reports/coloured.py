"""Responses token by token, each with V of the state that it was sampled from, as classes of colour."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recontrol.evaluation.measure import Answer
from recontrol.reports.comparison import Row, the_control

# Shades on each side of the middle.
SHADES = 8
# The share of the tokens whose V is inside the scale.
INSIDE = 0.98


@dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
        text: what it adds to the response.
        shade: from -SHADES to SHADES, 0 in the middle of the scale.
        value: V of the state that it was sampled from.
    """

    text: str
    shade: int
    value: float


@dataclass(frozen=True)
class Text:
    """A response.

    Attributes:
        name: of its row.
        reward: its own.
        pieces: its tokens; what adds no text to it is not among them.
    """

    name: str
    reward: float
    pieces: list[Piece]


@dataclass(frozen=True)
class Coloured:
    """Responses to the same prompts by some rows.

    Attributes:
        prompts: the texts responded to.
        texts: of each prompt one a row.
        middle: of the scale: the mean reward of the uncontrolled model.
        span: from the middle to either end of the scale.
    """

    prompts: list[str]
    texts: list[list[Text]]
    middle: float
    span: float


def coloured(rows: Sequence[Row], prompts: Sequence[str], most: int) -> Coloured | None:
    """The first responses of the uncontrolled model and of RE-Control; None where they were not recorded token by token with V.

    Args:
        rows: of the report.
        prompts: the test prompts.
        most: prompts to show.
    """
    control = the_control(rows[1:])
    shown = [row for row in (rows[0], control) if row is not None and row.result.answers]
    places = [place for place in range(len(prompts)) if shown and all(_known(row.result.answers[place]) for row in shown)][:most]
    if not places:
        return None
    middle = rows[0].result.reward
    distances = [abs(value - middle) for row in shown for place in places for value in row.result.answers[place].values or []]
    span = float(np.quantile(distances, INSIDE)) or 1.0
    texts = [[_text(row, place, middle, span) for row in shown] for place in places]
    return Coloured([prompts[place] for place in places], texts, middle, span)


def _known(answer: Answer) -> bool:
    return bool(answer.pieces) and bool(answer.values) and len(answer.pieces or []) == len(answer.values or [])


def _text(row: Row, place: int, middle: float, span: float) -> Text:
    answer = row.result.answers[place]
    pieces = [
        Piece(text, round(max(-1.0, min(1.0, (value - middle) / span)) * SHADES), value)
        for text, value in zip(answer.pieces or [], answer.values or [], strict=True)
        if text
    ]
    return Text(row.name, row.result.rewards[place], pieces)
