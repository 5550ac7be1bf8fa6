"""Pairs of a chosen and a rejected response from preference data: HH-RLHF, SHP, or files with columns of these names."""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from recontrol.checks import first_few
from recontrol.data.prompts import read_entries

logger = logging.getLogger(__name__)


class Preference(NamedTuple):
    """Two responses to one prompt, as they follow it: the one that was preferred, and the other one."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(source: str | os.PathLike, split: str = "train", *, skip_equal: bool = False, **options: Any) -> list[Preference]:
    """Read preferences, at least one, in the order of the source. The columns tell how:

    - `prompt`, `chosen`, `rejected`: taken as they are; the responses do not repeat the prompt;
    - `chosen`, `rejected` (HH-RLHF): two dialogues; the prompt is what they share, up to and including the last mark of the assistant, "Assistant:";
    - `history`, `human_ref_A`, `human_ref_B`, `labels` (SHP): a response begins with a space, and A is chosen where the label is 1.

    Args:
        source, split: as for `load_prompts`.
        skip_equal: leave out pairs of equal responses, which are refused otherwise; how many is logged.
        options: those of `load_prompts`: limit, tokenizer, chat_template (responses lose the space around them), human, max_prompt_tokens.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for `load_prompts`; rows have no text or no shared prompt, or pairs are equal.
    """
    equal: list[str] = []
    entries = read_entries(source, split, 2, equal, **options)
    check_equal(str(source), equal, entries, skip_equal)
    return [Preference(*entry) for entry in entries]


def check_equal(where: str, equal: Sequence[Any], others: Sequence[Any], skip_equal: bool) -> None:
    """Refuse pairs of equal responses, which are named, unless they are to be left out and there are others."""
    if equal and not skip_equal:
        raise ValueError(
            f"{where}: found {len(equal)} pairs whose chosen and rejected response are the same, so that there is nothing to prefer: {first_few(equal)}; "
            "correct them, or leave them out with skip_equal=True"
        )
    if not others:
        raise ValueError(f"{where}: no pair of different responses is left")
    if equal:
        logger.warning("left out %d pairs whose two responses are the same", len(equal))
