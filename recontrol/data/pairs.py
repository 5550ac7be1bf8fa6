"""Pairs of a chosen and a rejected response from preference data: HH-RLHF, SHP, or files with columns of these names."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from recontrol.data.batches import some
from recontrol.data.prompts import TURN, better_and_worse, load_rows, rename_user, render

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


def load_pairs(
    source: str | os.PathLike,
    split: str = "train",
    *,
    limit: int | None = None,
    tokenizer: Any = None,
    chat_template: bool = False,
    human: str = "Human",
    max_prompt_tokens: int | None = None,
    skip_equal: bool = False,
) -> list[Preference]:
    r"""Read preferences, in the order of the source. The columns tell how:

    - `prompt`, `chosen`, `rejected`: taken as they are; the responses do not repeat the prompt;
    - `chosen`, `rejected` (HH-RLHF): two dialogues; the prompt is what they share, up to and including the last mark of a turn
      of the assistant, "Assistant:";
    - `history`, `human_ref_A`, `human_ref_B`, `labels` (SHP): the prompt is f"{human}: {history}\nAssistant:", a response
      begins with a space, and A is chosen where the label is 1.

    Args:
        source: a data set of the hub, a folder that `datasets` can load, or a .jsonl, .jsonl.gz or .json file.
        split: which split; a local file has one, and `split` is not looked at.
        limit: keep at most this many pairs, the first ones.
        tokenizer: the language model's, for `chat_template` and `max_prompt_tokens`.
        chat_template: render the turns of the prompt with the tokenizer's chat template; responses lose the space around them.
        human: what the user's turns are marked with.
        max_prompt_tokens: leave out pairs with longer prompts (special tokens count); how many is logged.
        skip_equal: leave out pairs of equal responses, which are refused otherwise; how many is logged.

    Returns:
        The pairs; at least one.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: the source is empty or damaged, has none of these sets of columns, rows have no text or no shared prompt, pairs are
            equal (their lines are named), no prompt is short enough, or a tokenizer is needed and missing or has no chat template.
    """
    if tokenizer is None and (chat_template or max_prompt_tokens is not None):
        raise ValueError("chat_template and max_prompt_tokens need the tokenizer of the language model")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; use chat_template=False")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    rows = load_rows(str(source), split)
    kinds = {("prompt", "chosen", "rejected"): _as_is, ("chosen", "rejected"): _dialogues, ("history", "human_ref_A", "human_ref_B", "labels"): _question}
    columns = next((columns for columns in kinds if set(columns) <= set(rows.column_names)), None)
    if columns is None:
        raise ValueError(f"{source} has no pairs: wanted columns {' or '.join(map(str, kinds))}, found {rows.column_names}")
    # Rows of a file are counted from 1, as editors do.
    base, called = (1, "line") if Path(source).is_file() else (0, "row")
    pairs: list[Preference] = []
    equal: list[int] = []
    too_long = 0
    for number, row in enumerate(rows.select_columns(list(columns)), start=base):
        if len(pairs) == limit:
            break
        where = f"{source}: {called} {number}"
        missing = [name for name in columns if name != "labels" and not isinstance(row[name], str)]
        if missing:
            raise ValueError(f"{where} must have text in its columns {', '.join(missing)}")
        pair = kinds[columns](row, where, "Human" if chat_template else human)
        if pair.chosen == pair.rejected:
            equal.append(number)
            continue
        if chat_template:
            prompt = render(tokenizer, row.get("history", pair.prompt))
            pair = Preference(prompt, pair.chosen.strip(), pair.rejected.strip())
        if max_prompt_tokens is not None and len(tokenizer(pair.prompt).input_ids) > max_prompt_tokens:
            too_long += 1
            continue
        pairs.append(pair)
    if equal and not skip_equal:
        raise ValueError(
            f"{source} has {len(equal)} pairs whose chosen and rejected response are the same, so that there is nothing to prefer, in {called}s {some(equal)}; "
            "mend them, or leave them out with skip_equal=True"
        )
    if equal:
        logger.warning("left out %d pairs of %s whose two responses are the same", len(equal), source)
    if too_long:
        logger.info("left out %d pairs of %s with prompts of more than %d tokens", too_long, source, max_prompt_tokens)
    if not pairs:
        raise ValueError(f"{source} has no pair" + (f" with a prompt of at most {max_prompt_tokens} tokens ({too_long} are longer)" if too_long else ""))
    return pairs


def _as_is(row: dict[str, Any], where: str, human: str) -> Preference:
    if not row["prompt"].strip():
        raise ValueError(f"{where} must have text in its column prompt, found {row['prompt']!r}")
    return Preference(row["prompt"], row["chosen"], row["rejected"])


def _dialogues(row: dict[str, Any], where: str, human: str) -> Preference:
    chosen, rejected = row["chosen"], row["rejected"]
    # Most pairs part in the last turn, a few earlier.
    ends = [mark.end() for mark in TURN.finditer(chosen) if mark[1] == "Assistant" and rejected.startswith(chosen[: mark.end()])]
    if not ends:
        raise ValueError(f"{where}: two dialogues must begin alike, up to a turn of the assistant; found {chosen[:40]!r} and {rejected[:40]!r}")
    return Preference(*(rename_user(text, human) for text in (chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :])))


def _question(row: dict[str, Any], where: str, human: str) -> Preference:
    better, worse = better_and_worse(row, where)
    return Preference(f"{human}: {row['history']}\nAssistant:", " " + better, " " + worse)
