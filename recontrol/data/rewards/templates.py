"""How prompt and response are written as the one text that a reward model reads."""

import string
from collections.abc import Callable, Set
from typing import Any

from recontrol.data.dialogues import render_response

CHAT = "chat"


def text_writer(template: str | None, tokenizer: Any) -> Callable[[str, str], str]:
    """A function (prompt, response) -> text; see `RewardModel` for the templates."""
    if template is None:
        return lambda prompt, response: prompt + response
    if template == CHAT:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the reward model's tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template")
        return lambda prompt, response: render_response(tokenizer, prompt, response)
    check_fields("template of the reward model", template, {"prompt", "response"})
    mark = template.split("{prompt}")[0].strip()

    def write(prompt: str, response: str) -> str:
        # The prompts of dialogue data sets carry the marks of the turns already.
        if mark and prompt.lstrip().startswith(mark):
            return prompt + response
        return template.format(prompt=prompt, response=response.lstrip())

    return write


def check_fields(what: str, template: str, required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Refuse with a ValueError a text that lacks a required field in braces, or has another one."""
    wanted = " and ".join(f"{{{name}}}" for name in sorted(required))
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the {what} must have {wanted} in it, found {template!r} ({error})") from None
    if not required <= fields <= required | optional:
        raise ValueError(f"the {what} must have {wanted} in it and no other field, found {template!r}; write other braces twice")
