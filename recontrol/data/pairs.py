"""Pairs of a chosen and a rejected response from preference data: HH-RLHF, SHP, or files with columns of these names."""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from recontrol.checks import first_few
from recontrol.data.dialogues import TURN, rename_user
from recontrol.data.prompts import Maker, better_and_worse, question, read_entries

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
    kinds: dict[tuple[str, ...], Maker] = {
        ("prompt", "chosen", "rejected"): _as_is,
        ("chosen", "rejected"): _dialogues,
        ("history", "human_ref_A", "human_ref_B", "labels"): _question,
    }
    equal: list[str] = []

    def choose(names: list[str]) -> tuple[Sequence[str], Maker]:
        columns = next((columns for columns in kinds if set(columns) <= set(names)), None)
        if columns is None:
            raise ValueError(f"{source} has no pairs: wanted columns {' or '.join(map(str, kinds))}, found {names}")

        def make(row: dict[str, Any], human: str, where: str) -> Sequence[str] | None:
            entry = kinds[columns](row, human, where)
            if entry is not None and entry[1] == entry[2]:
                equal.append(where.removeprefix(f"{source}: "))
                return None
            return entry

        return columns, make

    entries, limited = read_entries(source, split, choose, **options)
    if equal and not skip_equal:
        raise ValueError(
            f"{source} has {len(equal)} pairs whose chosen and rejected response are the same, so that there is nothing to prefer: {first_few(equal)}; "
            "correct them, or leave them out with skip_equal=True"
        )
    if equal:
        logger.warning("left out %d pairs of %s whose two responses are the same", len(equal), source)
    if not entries:
        raise ValueError(f"{source} has no pair" + (f" with a prompt{limited}" if limited else ""))
    return [Preference(*entry) for entry in entries]


def _as_is(row: dict[str, Any], human: str, where: str) -> Preference:
    return Preference(row["prompt"], row["chosen"], row["rejected"])


def _dialogues(row: dict[str, Any], human: str, where: str) -> Preference:
    chosen, rejected = row["chosen"], row["rejected"]
    # Most pairs part in the last turn, a few earlier.
    ends = [mark.end() for mark in TURN.finditer(chosen) if mark[1] == "Assistant" and rejected.startswith(chosen[: mark.end()])]
    if not ends:
        raise ValueError(f"{where}: two dialogues must begin alike, up to a turn of the assistant; found {chosen[:40]!r} and {rejected[:40]!r}")
    return Preference(*(rename_user(text, human) for text in (chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :])))


def _question(row: dict[str, Any], human: str, where: str) -> Preference:
    return Preference(question(row["history"], human), *better_and_worse(row, where))
