"""Prompts and preferences from data sets of the hub and from local files. The response that is to be written is never in the prompt."""

import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recontrol.checks import first_few, renamed, required
from recontrol.data.dialogue import Prompt, read_turns, render_prompt

logger = logging.getLogger(__name__)

# Data sets whose prompts end with the mark of the assistant's turn. A model that was not tuned to stop goes on with the dialogue by itself.
DIALOGUES = ("Anthropic/hh-rlhf", "stanfordnlp/SHP")
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
# By the column of the prompt: the columns read for prompts alone, with the preferred response, and with the rejected one too.
ANSWERS = ("history", "human_ref_A", "human_ref_B", "labels")
COLUMNS = {
    "prompt": (("prompt",), ("prompt", "chosen"), ("prompt", "chosen", "rejected")),
    "chosen": (("chosen",), ("chosen",), ("chosen", "rejected")),
    "history": (("history",), ANSWERS, ANSWERS),
}
CALLED = ("prompts", "preferred responses", "pairs")
# The marks between the turns. A bare "Assistant:" or "Human:" inside a turn is text.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class Preference(NamedTuple):
    """Two responses to one prompt, as they follow it: the one that was preferred, and the other one."""

    prompt: str
    chosen: str
    rejected: str


def load_prompts(
    source: str | os.PathLike,
    split: str = "train",
    *,
    limit: int | None = None,
    tokenizer: Any = None,
    chat_template: bool = False,
    human: str = "Human",
    max_prompt_tokens: int | None = None,
) -> list[str]:
    r"""Read prompts, at least one, in the order of the source, as a list of `Prompt`. The columns tell how:

    - `prompt`: taken as it is;
    - `chosen` (HH-RLHF): the dialogue up to and including the mark of its last turn, "Assistant:"; the response is left out;
    - `history` (SHP): f"{human}: {history}\nAssistant:".

    Args:
        source: "Anthropic/hh-rlhf" or another data set of the hub, a folder that `datasets` can load, or a .jsonl, .jsonl.gz or .json file.
        split: which split; a local file has one, and `split` is ignored.
        limit: keep at most this many prompts, the first ones.
        tokenizer: the language model's, for `chat_template` and `max_prompt_tokens`.
        chat_template: render the turns of the dialogue with the tokenizer's chat template, ready for the assistant's next turn.
        human: what the user's turns are marked with; a chat template has its own marks.
        max_prompt_tokens: leave out longer prompts (special tokens count); a warning says how many.

    Raises FileNotFoundError, ImportError: no such source, or no package `datasets` (extra `train`). ValueError: it is empty, damaged or of other columns, a
    prompt is blank or none is short enough, or a tokenizer or template is missing. Source: Kong et al. 2024, section 5 and appendix.
    """
    return [prompt for (prompt,) in read_entries(source, split, 0, None, limit, tokenizer, chat_template, human, max_prompt_tokens)]


def load_prompts_with_preferred(source: str | os.PathLike, split: str = "train", **options: Any) -> tuple[list[str], list[str]]:
    """Read (prompts, responses), the prompts as `load_prompts` does and the response to each that the data set prefers (Kong et al. 2024, section 5).

    Args:
        source: as for `load_prompts`.
        split: as for `load_prompts`.
        options: those of `load_prompts`: limit, tokenizer, chat_template (responses lose the space around them), human, max_prompt_tokens.
    """
    entries = read_entries(source, split, 1, **options)
    return [prompt for prompt, _ in entries], [response for _, response in entries]


def load_prompts_with_references(source: str | os.PathLike, split: str = "train", **options: Any) -> tuple[list[str], list[str]]:
    """The old name of `load_prompts_with_preferred`."""
    renamed("load_prompts_with_references", "load_prompts_with_preferred")
    return load_prompts_with_preferred(source, split, **options)


def load_pairs(source: str | os.PathLike, split: str = "train", *, skip_equal: bool = False, **options: Any) -> list[Preference]:
    """Read preferences, at least one, in the order of the source. The columns tell how:

    - `prompt`, `chosen`, `rejected`: taken as they are; the responses do not repeat the prompt;
    - `chosen`, `rejected` (HH-RLHF): two dialogues; the prompt is what they share, up to and including the last mark of the assistant, "Assistant:";
    - `history`, `human_ref_A`, `human_ref_B`, `labels` (SHP): a response begins with a space, and A is chosen where the label is 1.

    Args:
        source: as for `load_prompts`.
        split: as for `load_prompts`.
        skip_equal: leave out pairs of equal responses, which are refused otherwise with a ValueError; a warning says how many.
        options: those of `load_prompts`: limit, tokenizer, chat_template (responses lose the space around them), human, max_prompt_tokens.
    """
    equal: list[str] = []
    entries = read_entries(source, split, 2, equal, **options)
    check_equal(str(source), equal, entries, skip_equal)
    return [Preference(*entry) for entry in entries]


def check_equal(where: str, equal: Sequence[Any], others: Sequence[Any], skip_equal: bool) -> None:
    """Refuse pairs of equal responses, which are named, unless they are to be left out and there are others."""
    if equal and not skip_equal:
        found = f"found {len(equal)} pairs whose chosen and rejected response are the same, so that there is nothing to prefer"
        raise ValueError(f"{where}: {found}: {first_few(equal)}; correct them, or leave them out with skip_equal=True")
    if not others:
        raise ValueError(f"{where}: no pair of different responses is left")
    if equal:
        logger.warning("left out %d pairs of %d whose two responses are the same", len(equal), len(equal) + len(others))


def turn_marks(source: str | None, human: str = "Human", chat_template: bool = False) -> list[str]:
    """Where responses to a data set's prompts end by default: the mark of a further turn of the user; a chat template ends turns with a token."""
    return [] if chat_template or source not in DIALOGUES else [f"\n\n{human}:", f"\n{human}:", f"{human}:"]


def read_entries(
    source: str | os.PathLike,
    split: str,
    responses: int,
    equal: list[str] | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    chat_template: bool = False,
    human: str = "Human",
    max_prompt_tokens: int | None = None,
) -> list[tuple[str, ...]]:
    """Prompts, each with so many responses, the preferred one first; with `equal`, entries of equal responses are named in it and left out."""
    if tokenizer is None and (chat_template or max_prompt_tokens is not None):
        raise ValueError("chat_template and max_prompt_tokens need the tokenizer of the language model")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; use chat_template=False")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    names, rows = load_rows(str(source), split)
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise ValueError(f"{source} has no column prompt, chosen or history; found {names}")
    columns = COLUMNS[column][responses]
    if not set(columns) <= set(names):
        raise ValueError(f"{source} has no {CALLED[responses]}: beside {column} it must have the columns {', '.join(columns[1:])}; found {names}")
    entries: list[tuple[str, ...]] = []
    too_long = 0
    for place, row in rows:
        if len(entries) == limit:
            break
        prompt, *further = _entry({name: row.get(name) for name in columns}, columns, responses, "Human" if chat_template else human, f"{source}: {place}")
        if equal is not None and len(set(further)) == 1:
            equal.append(place)
            continue
        if chat_template:
            prompt = render_prompt(tokenizer, prompt)
            further = [response.strip() for response in further]
        if max_prompt_tokens is not None and len(tokenizer(prompt).input_ids) > max_prompt_tokens:
            too_long += 1
            continue
        entries.append((prompt, *further))
    if too_long:
        read = too_long + len(entries)
        logger.warning("left out %d prompts of %d in %s: they have more than %d tokens", too_long, read, source, max_prompt_tokens)
    if not entries and not equal:
        raise ValueError(f"{source} has no prompt" + (f" of at most {max_prompt_tokens} tokens ({too_long} are longer)" if too_long else ""))
    return entries


def _entry(row: dict[str, Any], columns: Sequence[str], responses: int, human: str, where: str) -> tuple[str, ...]:
    """The prompt of a row and so many responses, as they follow the prompt."""
    missing = [name for name in columns if name != "labels" and not isinstance(row[name], str)]
    if missing:
        raise ValueError(f"{where} must have text in its columns {', '.join(missing)}")
    text = row[columns[0]]
    if not text.strip():
        raise ValueError(f"{where} must have text in its column {columns[0]}, found {text!r}")
    if columns[0] == "prompt":
        return (_told(text, rename_user(text, human)), *(row[name] for name in columns[1:]))
    if columns[0] == "history":
        if responses and row["labels"] not in (0, 1):
            raise ValueError(f"{where}: labels must be 1, where human_ref_A is preferred, or 0, found {row['labels']!r}")
        order = ("human_ref_A", "human_ref_B") if row.get("labels") else ("human_ref_B", "human_ref_A")
        return (Prompt(f"{human}: {text}\nAssistant:", [("user", text.strip())]), *(" " + row[name] for name in order[:responses]))
    end = end_of_prompt(text, row.get("rejected", text), where)
    dialogue = (text[end:], row.get("rejected", "")[end:])
    return (_told(text[:end], rename_user(text[:end], human)), *(rename_user(part, human) for part in dialogue[:responses]))


def _told(text: str, renamed: str) -> str:
    """A prompt with the turns that its text tells; the text alone where it tells none."""
    try:
        return Prompt(renamed, *read_turns(text))
    except ValueError:
        return renamed


def load_rows(source: str, split: str) -> tuple[list[str], Iterable[tuple[str, dict[str, Any]]]]:
    """The columns and rows (place, row) of a data set of the hub, of a folder that `datasets` can load, or of a .jsonl, .jsonl.gz or .json file."""
    path = Path(source)
    if path.is_file():
        if not source.endswith(FILE_ENDINGS):
            raise ValueError(f"{source}: prompts are read from {', '.join(FILE_ENDINGS)}")
        # Not by `datasets`, which takes names for patterns, and an older copy for a file of the same age.
        listed = _json_rows(path)
        if not listed:
            raise ValueError(f"{source} is empty: it has no prompt")
        return list(dict.fromkeys(name for _, row in listed for name in row)), listed
    if source.endswith(FILE_ENDINGS):
        raise FileNotFoundError(f"no prompts at {source!r}: there is no such file")
    datasets = required("datasets", "train")
    if path.is_dir() and glob.has_magic(str(path.resolve())):
        raise ValueError(f"{path.resolve()} has a *, ? or [ in its path, which `datasets` takes for a pattern: rename the folder, or name a file in it")
    try:
        # A folder by its whole path, since short names are those of readers.
        rows = datasets.load_dataset(str(path.resolve()) if path.is_dir() else source, split=split)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} is damaged or not JSON lines: {error.__cause__ or error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"no prompts at {source!r}: it is no local file or folder, and the hub did not answer ({error})") from error
    return rows.column_names, ((f"row {number}", row) for number, row in enumerate(rows))


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, or of one list, with their places: lines are counted from 1, as editors do."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
        # Not splitlines, which also splits at characters such as U+2028 inside a text.
        lines = json.loads(text) if text.lstrip().startswith("[") else [line.strip() and json.loads(line) for line in text.split("\n")]
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not JSON lines: {error}") from error
    rows = [(f"line {number}", row) for number, row in enumerate(lines, 1) if row != ""]
    others = [place for place, row in rows if not isinstance(row, dict)]
    if others:
        raise ValueError(f"{path} is damaged or not JSON lines: {others[0]} is no object")
    return rows


def end_of_prompt(dialogue: str, other: str, where: str) -> int:
    """Where the last turn of the assistant begins, after its mark, up to which two dialogues are the same; ValueError if there is none."""
    # Most pairs part in the last turn, a few earlier.
    ends = [mark.end() for mark in TURN.finditer(dialogue) if mark[1] == "Assistant" and other.startswith(dialogue[: mark.end()])]
    if ends:
        return ends[-1]
    if other == dialogue:
        raise ValueError(f"{where}: a dialogue must have a turn of the assistant, found {dialogue[-80:]!r}")
    raise ValueError(f"{where}: two dialogues must begin alike, up to a turn of the assistant; found {dialogue[:40]!r} and {other[:40]!r}")


def rename_user(text: str, human: str) -> str:
    """A dialogue in which the user's turns are marked with another word than "Human"."""
    return TURN.sub(lambda mark: mark[0].replace("Human", human), text) if human != "Human" else text
