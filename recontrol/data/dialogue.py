"""Prompts that keep their turns, so that the language model and each reward model read them in a template of their own."""

import contextlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from recontrol.checks import required

Turns = Sequence[tuple[str, str]]
# What chat templates write around turns; a text with such marks and no turns of its own cannot be told apart.
TEMPLATE_MARKS = re.compile(r"<[|\uff5c][^<>\s]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
# The start of an answer behind a mark that is not one of ours, as "ASSISTANT:" at the end of a line or "### Response:".
OTHER_MARKS = re.compile(r"(?i:\b(?:assistant|chatbot|gpt)|###\s*\w+)\s*:\s*\Z")
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


class Prompt(str):
    """A prompt: the text that the language model reads, and the turns that it was written from, for readers with another template.

    Args:
        text: what the language model reads.
        turns: pairs (role, content), the roles "system", "user" and "assistant"; by default those that marks in the text tell. ValueError for others.
        begun: the first words of the response where the prompt has them already, with their spaces.
        chat_template: whether the text is written with a chat template; else it is what a person wrote, with words such as "Human:" as marks.
    """

    turns: tuple[tuple[str, str], ...]
    begun: str
    chat_template: bool

    def __new__(cls, text: str, turns: Turns = (), begun: str = "", chat_template: bool = False) -> "Prompt":
        """The text, with its turns beside it."""
        prompt = super().__new__(cls, text)
        if not turns:
            turns, begun = read_turns(text)
        pairs: Any = tuple(tuple(turn.values() if isinstance(turn, Mapping) else turn) for turn in turns)
        if any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) or pair[0] not in ("system", *ROLES.values()) for pair in pairs):
            raise ValueError(f"turns must be pairs (role, content) of the roles system, user and assistant, found {turns!r}")
        prompt.turns, prompt.begun, prompt.chat_template = pairs, begun, chat_template
        return prompt

    def __getnewargs__(self) -> Any:
        """What a copy and a pickle are made of."""
        return str(self), self.turns, self.begun, self.chat_template


def turns_of(prompt: str) -> tuple[Turns, str]:
    """The turns of a prompt and its begun answer: its own, else those that its marks tell; ValueError where nothing does."""
    return (prompt.turns, prompt.begun) if isinstance(prompt, Prompt) else read_turns(prompt)


def read_turns(text: str) -> tuple[Turns, str]:
    r"""The turns of a text with marks such as "\n\nHuman:" (HH-RLHF) or "\nAssistant:" (SHP), else one turn of the user, and a begun answer."""
    for gap in (r"\n\n", r"\n"):
        for word in ("Human", "User"):
            marks = [*re.finditer(rf"(?:\A\s*|{gap})({word}|Assistant):", text)]
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            before = text[: marks[0].start()] if marks else text
            asked = any(mark[1] == word for mark in marks) or (marks and not before)
            if not asked or (marks[-1][1] != "Assistant" and (before or gap == r"\n\n")):
                continue
            if TEMPLATE_MARKS.search(before):
                _refuse(text)
            system = before.strip().removeprefix("System:").strip()
            spoken = [(ROLES[mark[1]], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
            begun = spoken.pop()[1] if spoken[-1][0] == "assistant" else ""
            return joined([("system", system)] * bool(system) + spoken), begun.lstrip() if begun.strip() else ""
    if TEMPLATE_MARKS.search(text) or OTHER_MARKS.search(text):
        _refuse(text)
    return (("user", text.strip()),), ""


def joined(turns: Turns) -> Turns:
    """The turns without space around them, those of one speaker in a row as one: templates want the roles to alternate."""
    together: list[tuple[str, str]] = []
    for role, content in turns:
        if together and together[-1][0] == role:
            content = f"{together.pop()[1]}\n\n{content.strip()}"
        together.append((role, content.strip()))
    return tuple(together)


def _refuse(text: str) -> NoReturn:
    advice = "take prompts from `load_prompts`, or give recontrol.Prompt(text, turns), with (role, content) of each turn"
    raise ValueError(f"the turns of the prompt {text[:60]!r} cannot be told apart: it seems to be written with a template already; {advice}")


def render(tokenizer: Any, turns: Turns, **options: Any) -> str:
    """The turns as the tokenizer's chat template writes them, for a text that the tokenizer will read; ValueError where it refuses them."""
    errors = required("jinja2", "report").exceptions
    # Some templates know no system turn: then it is the beginning of the user's first one.
    folded = (("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]) if [role for role, _ in turns[:2]] == ["system", "user"] else turns
    rendered, failure = "", None
    for each in (turns, folded):
        try:
            rendered = tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in each], tokenize=False, **options)
            break
        except errors.TemplateError as error:
            failure = error
    if not rendered:
        raise ValueError(f"the chat template of {tokenizer.name_or_path!r} cannot write turns of {', '.join(role for role, _ in turns)}: {failure}")
    # The tokenizer puts the beginning-of-sequence token there again.
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    return rendered


def render_prompt(tokenizer: Any, text: str) -> Prompt:
    """A prompt written with the chat template, ready for the assistant's next turn, or to go on with what is begun of it."""
    turns, begun = turns_of(text)
    return Prompt(render(tokenizer, turns, add_generation_prompt=True) + begun, turns, begun, True)


def write_marked(turns: Turns, user: str = "\n\nHuman: ", assistant: str = "\n\nAssistant: ", end: str = "") -> str:
    """The turns with marks before them, and `end` behind each of the assistant's."""
    gap, text = "\n\n" if "\n\n" in assistant else "\n", ""
    for role, content in turns:
        mark = {"user": user, "assistant": assistant, "system": ""}[role]
        text += (gap if text and role == "user" and not mark.startswith("\n") else "") + mark + content + (end if role == "assistant" else "")
    return text if user.startswith("\n") else text.lstrip("\n")


def fill(template: str, prompt: str, response: str) -> str:
    """A template filled in turn by turn with the marks before its two fields; a prompt that has these marks already is left as it is."""
    literals = [literal for literal, *_ in string.Formatter().parse(template)]
    user, assistant, end = literals[0], literals[1], "".join(literals[2:])
    chat = getattr(prompt, "chat_template", False)
    marked = user.strip() and assistant.strip() and template.index("{prompt") < template.index("{response")
    if not marked and not chat:
        # Its own space takes the place of the response's.
        return template.format(prompt=prompt, response=response.lstrip() if template.partition("{response")[0][-1:].isspace() else response)
    if not chat and prompt.lstrip().startswith(user.strip()) and re.search(rf"^{re.escape(assistant.strip())}", prompt, re.M):
        return prompt + response + end
    turns, begun = turns_of(prompt)
    said = [*turns, ("assistant", (begun + response).lstrip())]
    return write_marked(said, user, assistant, end) if marked else write_marked(said)


def readable(prompt: str) -> str:
    """A prompt for a reader who knows no chat template: as it is, or with the marks of HH-RLHF in place of a template's."""
    if not getattr(prompt, "chat_template", False):
        return prompt
    turns, begun = turns_of(prompt)
    return write_marked([*turns, ("assistant", begun)]).removesuffix(" ")


def turns_entry(prompt: str) -> dict[str, Any]:
    """What a line of JSON says of a prompt beside its text: the turns, unless the text tells them."""
    if not isinstance(prompt, Prompt):
        return {}
    with contextlib.suppress(ValueError):
        if not prompt.chat_template and read_turns(str(prompt)) == (prompt.turns, prompt.begun):
            return {}
    return {"turns": prompt.turns, "begun": prompt.begun, "chat_template": prompt.chat_template}


def prompt_of(entry: Mapping[str, Any]) -> str:
    """The prompt of a line of JSON."""
    return Prompt(entry["prompt"], entry["turns"], entry.get("begun", ""), entry.get("chat_template", False)) if entry.get("turns") else entry["prompt"]
