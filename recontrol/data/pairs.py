"""Pairs of a chosen and a rejected response from preference data: HH-RLHF, SHP, or files with columns of these names."""

import logging
import os
from typing import Any, NamedTuple

from recontrol.checks import first_few
from recontrol.data.prompts import read_entries

logger = logging.getLogger(__name__)


class Preference(NamedTuple):
    """Two responses to one prompt.

    Attributes:
        prompt: what both respond to.
        chosen: the response that was preferred, as it follows the prompt.
        rejected: the other one.
    """

    prompt: str
    chosen: str
    rejected: str


def load_pairs(source: str | os.PathLike, split: str = "train", *, skip_equal: bool = False, **options: Any) -> list[Preference]:
    r"""Read preferences, in the order of the source. The columns tell how:

    - `prompt`, `chosen`, `rejected`: taken as they are; the responses do not repeat the prompt;
    - `chosen`, `rejected` (HH-RLHF): two dialogues; the prompt is what they share, up to and including the last mark of a turn
      of the assistant, "Assistant:";
    - `history`, `human_ref_A`, `human_ref_B`, `labels` (SHP): the prompt is f"{human}: {history}\nAssistant:", a response
      begins with a space, and A is chosen where the label is 1.

    Args:
        source: a data set of the hub, a folder that `datasets` can load, or a .jsonl, .jsonl.gz or .json file.
        split: which split; a local file has one, and `split` is ignored.
        skip_equal: leave out pairs of equal responses, which are refused otherwise; how many is logged.
        options: those of `load_prompts`: limit, tokenizer, chat_template (responses lose the space around them), human, max_prompt_tokens.

    Returns:
        The pairs; at least one.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: as for `load_prompts`, the source has none of these sets of columns, rows have no text or no shared prompt, or pairs are
            equal (their lines are named).
    """
    equal: list[str] = []
    entries = read_entries(source, split, 2, equal, **options)
    if equal and not skip_equal:
        raise ValueError(
            f"{source} has {len(equal)} pairs whose chosen and rejected response are the same, so that there is nothing to prefer: {first_few(equal)}; "
            "correct them, or leave them out with skip_equal=True"
        )
    if equal:
        logger.warning("left out %d pairs of %s whose two responses are the same", len(equal), source)
    if not entries:
        raise ValueError(f"{source} has no pair of different responses")
    return [Preference(*entry) for entry in entries]
