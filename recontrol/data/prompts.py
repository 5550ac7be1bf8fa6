"""Prompts from data sets of the hub and from local files. The response that is to be written is never in the prompt."""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# The marks between the turns of a dialogue of HH-RLHF. A bare "Assistant:" or "Human:" inside a turn is text.
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
# By the column of the prompt, the columns that tell the preferred response beside it.
REFERENCE_COLUMNS = {"prompt": ("chosen",), "chosen": (), "history": ("human_ref_A", "human_ref_B", "labels")}
# Data sets whose prompts end with the mark of the assistant's turn. A model that was not tuned to stop goes on with the dialogue by itself.
DIALOGUES = ("Anthropic/hh-rlhf", "stanfordnlp/SHP")
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


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
    r"""Read prompts, in the order of the source. The columns tell how:

    - `prompt`: taken as it is;
    - `chosen` (HH-RLHF): the dialogue up to and including the mark of its last turn, "Assistant:"; the response is left out;
    - `history` (SHP): f"{human}: {history}\nAssistant:".

    Args:
        source: "Anthropic/hh-rlhf", "stanfordnlp/SHP" or another data set of the hub, a folder that `datasets` can load,
            or a .jsonl, .jsonl.gz or .json file.
        split: which split; a local file has one, and `split` is not looked at.
        limit: keep at most this many prompts, the first ones.
        tokenizer: the language model's, for `chat_template` and `max_prompt_tokens`.
        chat_template: turn the turns of the dialogue into messages and render them with the tokenizer's chat template,
            ready for the assistant's next turn.
        human: what the user's turns are marked with; a chat template has marks of its own.
        max_prompt_tokens: leave out longer prompts (special tokens count); how many is logged.

    Returns:
        The prompts; at least one.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: the source is empty or damaged, has none of these columns, a prompt is blank, no prompt is short
            enough, or a tokenizer is needed and missing or has no chat template.

    Source: Kong et al. 2024, section 5 and appendix (data sets; prompts of at most 512 tokens).
    """
    prompts, _ = _load(source, split, False, limit, tokenizer, chat_template, human, max_prompt_tokens)
    return prompts


def load_prompts_with_references(
    source: str | os.PathLike,
    split: str = "train",
    *,
    limit: int | None = None,
    tokenizer: Any = None,
    chat_template: bool = False,
    human: str = "Human",
    max_prompt_tokens: int | None = None,
) -> tuple[list[str], list[str]]:
    r"""Read prompts as `load_prompts` does, each with the response that the data set prefers. The columns tell how:

    - `prompt`, `chosen`: the response as it is;
    - `chosen` (HH-RLHF): what follows the mark of the last turn, "Assistant:";
    - `history`, `human_ref_A`, `human_ref_B`, `labels` (SHP): " " and the answer with the higher score, which is A where the label is 1.

    Args:
        source: this and the rest as for `load_prompts`.
        split: which split.
        limit: keep at most this many prompts.
        tokenizer: for `chat_template` and `max_prompt_tokens`.
        chat_template: render the prompts; the responses lose the space around them.
        human: what the user's turns are marked with.
        max_prompt_tokens: leave out longer prompts, with their responses.

    Returns:
        (prompts, responses), the prompts being those that `load_prompts` returns for the same arguments.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: as for `load_prompts`, the source has no preferred responses, or a row has none.

    Source: Kong et al. 2024, section 5 (win rate against the preferred response of the data set).
    """
    return _load(source, split, True, limit, tokenizer, chat_template, human, max_prompt_tokens)


def turn_marks(source: str | None, human: str = "Human", chat_template: bool = False) -> list[str]:
    """The strings at which responses to a data set's prompts end by default: the mark of a further turn of the user, as models write it.

    Args:
        source: the data set.
        human: what the user's turns are marked with.
        chat_template: whether the tokenizer's chat template is used, whose turns end with a token.

    Returns:
        Empty for what is no data set of dialogues.
    """
    if chat_template or source not in DIALOGUES:
        return []
    return [f"\n\n{human}:", f"\n{human}:", f"{human}:"]


def load_rows(source: str, split: str) -> "datasets.Dataset":
    """The rows of a data set of the hub, of a folder that `datasets` can load, or of a .jsonl, .jsonl.gz or .json file.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: the source is empty or damaged, or has no such split.
    """
    # A second of imports that decoding does not need.
    import datasets

    path = Path(source)
    try:
        if path.is_file():
            if not source.endswith(FILE_ENDINGS):
                raise ValueError(f"{source}: prompts are read from {', '.join(FILE_ENDINGS)}")
            return datasets.load_dataset("json", data_files=str(path), split="train")
        if source.endswith(FILE_ENDINGS):
            raise FileNotFoundError(f"no prompts at {source!r}: there is no such file")
        return datasets.load_dataset(source, split=split)
    # An empty file ends the reader's own iteration; a blank one leaves it without a split.
    except StopIteration:
        raise ValueError(f"{source} is empty: it has no prompt") from None
    except ValueError as error:
        raise ValueError(f"{source} is empty: it has no prompt" if "corresponds to no data" in str(error) else f"{source}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} is damaged or not JSON lines: {error.__cause__ or error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"no prompts at {source!r}: it is no local file or folder, and the hub did not answer ({error})") from error


def _load(
    source: str | os.PathLike,
    split: str,
    with_references: bool,
    limit: int | None,
    tokenizer: Any,
    chat_template: bool,
    human: str,
    max_prompt_tokens: int | None,
) -> tuple[list[str], list[str]]:
    """The prompts, and with `with_references` the preferred response to each."""
    if tokenizer is None and (chat_template or max_prompt_tokens is not None):
        raise ValueError("chat_template and max_prompt_tokens need the tokenizer of the language model")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; use chat_template=False")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    rows = load_rows(str(source), split)
    column = next((name for name in ("prompt", "chosen", "history") if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"{source} has no column prompt, chosen or history; found {rows.column_names}")
    further = REFERENCE_COLUMNS[column] if with_references else ()
    if not set(further) <= set(rows.column_names):
        raise ValueError(f"{source} has no preferred responses: beside {column} it must have the columns {', '.join(further)}; found {rows.column_names}")
    prompts: list[str] = []
    references: list[str] = []
    too_long = 0
    for number, row in enumerate(rows.select_columns([column, *further])):
        if len(prompts) == limit:
            break
        where, text = f"{source}: row {number}", row[column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} must have text in its column {column}, found {text!r}")
        prompt = _prompt(text, column, "Human" if chat_template else human, where)
        if chat_template:
            prompt = render(tokenizer, text if column == "history" else prompt)
        if max_prompt_tokens is not None and len(tokenizer(prompt).input_ids) > max_prompt_tokens:
            too_long += 1
            continue
        if with_references:
            reference = _reference(row, column, where)
            references.append(reference.strip() if chat_template else reference)
        prompts.append(prompt)
    if too_long:
        logger.info("left out %d prompts of %s with more than %d tokens", too_long, source, max_prompt_tokens)
    if not prompts:
        raise ValueError(f"{source} has no prompt" + (f" of at most {max_prompt_tokens} tokens ({too_long} are longer)" if too_long else ""))
    return prompts, references


def _prompt(text: str, column: str, human: str, where: str) -> str:
    """The prompt of a row, as text."""
    if column == "history":
        return f"{human}: {text}\nAssistant:"
    return rename_user(text[: _end_of_prompt(text, where)] if column == "chosen" else text, human)


def _reference(row: dict[str, Any], column: str, where: str) -> str:
    """The preferred response of a row, as it follows the prompt."""
    missing = [name for name in REFERENCE_COLUMNS[column] if name != "labels" and not isinstance(row[name], str)]
    if missing:
        raise ValueError(f"{where} must have text in its columns {', '.join(missing)}")
    if column == "history":
        return " " + better_and_worse(row, where)[0]
    return row["chosen"] if column == "prompt" else row["chosen"][_end_of_prompt(row["chosen"], where) :]


def better_and_worse(row: dict[str, Any], where: str) -> tuple[str, str]:
    """The two answers of a row of SHP, the preferred one first.

    Args:
        row: with its columns human_ref_A, human_ref_B and labels.
        where: what to call the row in an error.

    Raises:
        ValueError: a label that is neither 0 nor 1.
    """
    if row["labels"] not in (0, 1):
        raise ValueError(f"{where}: labels must be 1, where human_ref_A is preferred, or 0, found {row['labels']!r}")
    return (row["human_ref_A"], row["human_ref_B"]) if row["labels"] else (row["human_ref_B"], row["human_ref_A"])


def _end_of_prompt(dialogue: str, where: str) -> int:
    """Where the last turn of the assistant begins, after its mark."""
    ends = [mark.end() for mark in TURN.finditer(dialogue) if mark[1] == "Assistant"]
    if not ends:
        raise ValueError(f"{where}: a dialogue must have a turn of the assistant, found {dialogue[-80:]!r}")
    return ends[-1]


def rename_user(text: str, human: str) -> str:
    """A dialogue in which the user's turns are marked with another word than "Human"."""
    return TURN.sub(lambda mark: f"\n\n{human}:" if mark[1] == "Human" else mark[0], text) if human != "Human" else text


def render(tokenizer: Any, text: str) -> str:
    """Render a dialogue, or one turn of the user, with the chat template."""
    _, *parts = TURN.split(text) if TURN.match(text) else ("", "Human", text)
    messages: list[dict[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            # Templates want the roles to alternate, and the data have turns that were cut in two.
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": ROLES[speaker], "content": content.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The tokenizer puts the beginning-of-sequence token there again.
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    return rendered
