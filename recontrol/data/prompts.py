"""Prompts and preferences from data sets of the hub and from local files. The response that is to be written is never in the prompt."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recontrol.checks import first_few, renamed, required

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
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


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
    r"""Read prompts, at least one, in the order of the source. The columns tell how:

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
        max_prompt_tokens: leave out longer prompts (special tokens count); how many is logged.

    Raises:
        FileNotFoundError, ImportError: the source is neither here nor on the hub, or the package `datasets` (extra `train`) is not installed.
        ValueError: the source is empty or damaged, has no such column, or no prompt short enough; a prompt is blank; a tokenizer or template is missing.

    Source: Kong et al. 2024, section 5 and appendix (data sets; prompts of at most 512 tokens).
    """
    return [prompt for (prompt,) in read_entries(source, split, 0, None, limit, tokenizer, chat_template, human, max_prompt_tokens)]


def load_prompts_with_preferred(source: str | os.PathLike, split: str = "train", **options: Any) -> tuple[list[str], list[str]]:
    """Read (prompts, responses), the prompts as `load_prompts` does and the response to each that the data set prefers.

    That is `chosen` as it is, of HH-RLHF what follows the mark of the last turn, and of SHP " " and the answer that `labels` prefers, A where it is 1.

    Args:
        source: as for `load_prompts`.
        split: as for `load_prompts`.
        options: those of `load_prompts`: limit, tokenizer, chat_template (responses lose the space around them), human, max_prompt_tokens.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for `load_prompts`, or a row has no preferred response.

    Source: Kong et al. 2024, section 5 (win rate against the preferred response of the data set).
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
    rows = load_rows(str(source), split)
    names = rows.column_names
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise ValueError(f"{source} has no column prompt, chosen or history; found {names}")
    columns = COLUMNS[column][responses]
    if not set(columns) <= set(names):
        raise ValueError(f"{source} has no {CALLED[responses]}: beside {column} it must have the columns {', '.join(columns[1:])}; found {names}")
    # Lines of a file are counted from 1, as editors do.
    base, called = (1, "line") if Path(source).is_file() else (0, "row")
    entries: list[tuple[str, ...]] = []
    too_long = 0
    for number, row in enumerate(rows.select_columns(list(columns)), start=base):
        if len(entries) == limit:
            break
        prompt, *further = _entry(row, columns, responses, "Human" if chat_template else human, f"{source}: {called} {number}")
        if equal is not None and len(set(further)) == 1:
            equal.append(f"{called} {number}")
            continue
        if chat_template:
            prompt = render_prompt(tokenizer, row.get("history", prompt))
            further = [response.strip() for response in further]
        if max_prompt_tokens is not None and len(tokenizer(prompt).input_ids) > max_prompt_tokens:
            too_long += 1
            continue
        entries.append((prompt, *further))
    if too_long:
        logger.info("left out %d prompts of %s with more than %d tokens", too_long, source, max_prompt_tokens)
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
        return (rename_user(text, human), *(row[name] for name in columns[1:]))
    if columns[0] == "history":
        if responses and row["labels"] not in (0, 1):
            raise ValueError(f"{where}: labels must be 1, where human_ref_A is preferred, or 0, found {row['labels']!r}")
        # The preferred one first.
        order = ("human_ref_A", "human_ref_B") if row.get("labels") else ("human_ref_B", "human_ref_A")
        return (f"{human}: {text}\nAssistant:", *(" " + row[name] for name in order[:responses]))
    end = end_of_prompt(text, row.get("rejected", text), where)
    dialogue = (text[:end], text[end:], row.get("rejected", "")[end:])
    return tuple(rename_user(part, human) for part in dialogue[: responses + 1])


def load_rows(source: str, split: str) -> Any:
    """The rows of a data set of the hub, of a folder that `datasets` can load, or of a .jsonl, .jsonl.gz or .json file, as a `datasets.Dataset`."""
    datasets = required("datasets", "train")
    path = Path(source)
    try:
        if path.is_file() and not source.endswith(FILE_ENDINGS):
            raise ValueError(f"prompts are read from {', '.join(FILE_ENDINGS)}")
        if path.is_file():
            return datasets.load_dataset("json", data_files=str(path), split="train")
        if source.endswith(FILE_ENDINGS):
            raise FileNotFoundError(f"no prompts at {source!r}: there is no such file")
        return datasets.load_dataset(source, split=split)
    # An empty file ends the reader's own iteration; a blank one leaves it without a split.
    except (StopIteration, ValueError) as error:
        empty = isinstance(error, StopIteration) or "corresponds to no data" in str(error)
        raise ValueError(f"{source} is empty: it has no prompt" if empty else f"{source}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} is damaged or not JSON lines: {error.__cause__ or error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"no prompts at {source!r}: it is no local file or folder, and the hub did not answer ({error})") from error


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
    return TURN.sub(lambda mark: f"\n\n{human}:" if mark[1] == "Human" else mark[0], text) if human != "Human" else text


def messages_of(text: str) -> list[dict[str, str]]:
    """The turns of a dialogue, or one turn of the user, as messages."""
    _, *parts = TURN.split(text) if TURN.match(text) else ("", "Human", text)
    messages: list[dict[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            # Templates want the roles to alternate, and the data have turns that were cut in two.
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": ROLES[speaker], "content": content.strip()})
    return messages


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The messages as the tokenizer's chat template writes them, for a text that the tokenizer will read."""
    required("jinja2", "report")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    # The tokenizer puts the beginning-of-sequence token there again.
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    return rendered


def render_prompt(tokenizer: Any, text: str) -> str:
    """A dialogue, or one turn of the user, with the chat template, ready for the assistant's next turn."""
    messages = messages_of(text)
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return render(tokenizer, messages, add_generation_prompt=True)


def render_response(tokenizer: Any, prompt: str, response: str) -> str:
    """A dialogue with the response as the assistant's last turn, with the chat template."""
    messages = messages_of(prompt)
    if messages[-1]["role"] == "assistant":
        # The mark of the turn that the response fills, perhaps with its first words.
        response = f"{messages.pop()['content']} {response.strip()}"
    return render(tokenizer, [*messages, {"role": "assistant", "content": response.strip()}])
