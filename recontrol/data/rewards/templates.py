"""How prompt and response are written as the one text that a reward model reads."""

import string
from collections.abc import Callable
from typing import Any

from recontrol.data.prompts import ROLES, TURN

CHAT = "chat"


def text_writer(template: str | None, tokenizer: Any) -> Callable[[str, str], str]:
    """A function (prompt, response) -> text.

    Args:
        template: None, the prompt with the response after it; a text with {prompt} and {response} in it, which is left out where the
            prompt starts with the template's own mark already; or "chat", the tokenizer's chat template.
        tokenizer: of the reward model.

    Raises:
        ValueError: a template without {prompt} or {response} or with other fields, or a tokenizer without chat template.
    """
    if template is None:
        return lambda prompt, response: prompt + response
    if template == CHAT:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the reward model's tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template")
        return lambda prompt, response: _rendered(tokenizer, prompt, response)
    check_fields("template of the reward model", template, {"prompt", "response"})
    mark = template.split("{prompt}")[0].strip()

    def write(prompt: str, response: str) -> str:
        # The prompts of dialogue data sets carry the marks of the turns already.
        if mark and prompt.lstrip().startswith(mark):
            return prompt + response
        return template.format(prompt=prompt, response=response.lstrip())

    return write


def check_fields(what: str, template: str, required: set[str], optional: set[str] | None = None) -> None:
    """Refuse a template that cannot be filled in.

    Args:
        what: what it is, for the message.
        template: a text with fields in braces.
        required: the fields that must be in it.
        optional: those that may be.

    Raises:
        ValueError: a required field is missing, another one is in it, or its braces are not in pairs.
    """
    wanted = " and ".join(f"{{{name}}}" for name in sorted(required))
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the {what} must have {wanted} in it, found {template!r} ({error})") from None
    if not required <= fields <= required | (optional or set()):
        raise ValueError(f"the {what} must have {wanted} in it and no other field, found {template!r}; write other braces twice")


def _rendered(tokenizer: Any, prompt: str, response: str) -> str:
    """The dialogue with the response as the assistant's last turn."""
    _, *parts = TURN.split(prompt) if TURN.match(prompt) else ("", "Human", prompt)
    messages = [{"role": ROLES[speaker], "content": content.strip()} for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    if messages[-1]["role"] == "assistant":
        # The mark of the turn that the response fills, perhaps with its first words.
        response = f"{messages.pop()['content']} {response.strip()}"
    rendered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response.strip()}], tokenize=False)
    # The tokenizer puts the beginning-of-sequence token there again.
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    return rendered
