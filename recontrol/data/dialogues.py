"""Dialogues: their turns by the marks of HH-RLHF, and written with a chat template."""

import re
from typing import Any

from recontrol.checks import required

# The marks between the turns. A bare "Assistant:" or "Human:" inside a turn is text.
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


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
