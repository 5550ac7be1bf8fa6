"""Alignment by the prompt: an instruction around it, and examples before it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recontrol.data.dialogue import Prompt
from recontrol.data.rollouts import Rollouts
from recontrol.methods.base import Method, one_score

PLACE = "{prompt}"
INSTRUCTIONS = {
    "helpful": (
        "Below is a conversation between a person and an AI assistant. The assistant finds out what the person needs and answers it directly. "
        "Its replies are correct, concrete and as detailed as the question deserves, and it says so when it is not sure of something."
    ),
    "harmless": (
        "Below is a conversation between a person and an AI assistant. The assistant never insults anybody and never helps to hurt people or to break the "
        "law. Asked for such a thing, it declines politely, says why, and offers something safe that it can do instead."
    ),
}
INSTRUCTIONS["helpful and harmless"] = (
    f"{INSTRUCTIONS['helpful']} It is careful as well: it never insults anybody, declines politely to help with what could hurt people or break the law, "
    "and then offers something safe that it can do instead."
)
# Characters of a template without a name that tables show.
SHOWN = 40


@dataclass(frozen=True)
class Prompting(Method):
    r"""The prompt inside a template, with examples of good responses before it: `template` with "{prompt}" replaced by examples and prompt.

    The template has "{prompt}" exactly once, other braces are text. Examples are pairs (prompt, response), each response right after its prompt, and then
    the separator, but only once where the next prompt begins with it. Tables show `name`, by default the template's first words.
    Source: Kong et al. 2024, section 5 (baselines: prompt engineering).
    """

    kind = "prompting"
    template: str = PLACE
    examples: Sequence[tuple[str, str]] = ()
    separator: str = field(default="\n\n", kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, text in (("template", self.template), ("separator", self.separator), ("name", self.name or "")):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a text, found {type(text).__name__}")
        if (count := self.template.count(PLACE)) != 1:
            raise ValueError(f"a template must have {PLACE} exactly once, found it {count} times in {self.template!r}")
        for number, example in enumerate(self.examples):
            pair = () if isinstance(example, str) else tuple(example)
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError(f"example {number} must be a pair of texts (prompt, response), found {example!r}")
            if not pair[1].strip():
                raise ValueError(f"example {number} has a blank response, to the prompt {pair[0][-SHOWN:]!r}")
        object.__setattr__(self, "examples", tuple(map(tuple, self.examples)))
        if self.template == PLACE and not self.examples:
            raise ValueError("found neither a template nor examples: that is the uncontrolled model")

    @classmethod
    def for_dialogues(cls, goal: str = "helpful and harmless", examples: Sequence[tuple[str, str]] = ()) -> "Prompting":
        r"""An instruction before a dialogue such as "\n\nHuman: ...\n\nAssistant:" (HH-RLHF) or "Human: ...\nAssistant:" (SHP), by its goal.

        The goal is "helpful", "harmless" or "helpful and harmless", else ValueError; examples are pairs (dialogue, response).
        """
        if goal not in INSTRUCTIONS:
            raise ValueError(f"unknown goal {goal!r}; choose one of {', '.join(map(repr, INSTRUCTIONS))}")
        return cls(f"{INSTRUCTIONS[goal]}\n\n{PLACE}", examples, name=goal)

    @property
    def settings(self) -> dict[str, Any]:
        """The template's name or first words, and how many examples there are."""
        shown = " ".join(self.template.split())
        named = self.name or (shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...")
        return {**({} if self.template == PLACE else {"template": named}), **({"examples": len(self.examples)} if self.examples else {})}

    @property
    def identity(self) -> Any:
        """The texts."""
        return [self.template, [list(example) for example in self.examples], self.separator]

    def write(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        before, _, after = self.template.partition(PLACE)
        for asked, answered in self.examples:
            before = self._append(before, asked + answered)
            before += "" if before.endswith(self.separator) else self.separator
        written = self._append(before, prompt) + after
        return Prompt(written, prompt.turns, prompt.begun, prompt.chat_template) if isinstance(prompt, Prompt) else written

    def _append(self, text: str, more: str) -> str:
        return text + (more.removeprefix(self.separator) if text.endswith(self.separator) else more)


def best_examples(rollouts: Rollouts | str | os.PathLike, count: int = 3, *, head_weights: Sequence[float] | None = None) -> list[tuple[str, str]]:
    """The best-rewarded responses of rollouts, as in-context examples: of each prompt its best response, of these the best.

    They are pairs (prompt, response), the best one last, where it is nearest to the prompt; of equals the earlier in the rollouts counts as the better.
    The rollouts should be of other prompts than those of a comparison; where there are several rewards, `head_weights` give their weighted sum.
    """
    rollouts = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    prompts = len(rollouts.groups.unique())
    if not 1 <= count <= prompts:
        raise ValueError(f"count must be from 1 to {prompts}, the prompts of {rollouts.path}, found {count}")
    best: dict[int, int] = {}
    for index in one_score(rollouts.rewards, head_weights).argsort(descending=True, stable=True).tolist():
        best.setdefault(int(rollouts.groups[index]), index)
    chosen = list(best.values())[:count]
    found = {index: (record["prompt"], record["response"]) for index, record in enumerate(rollouts.records()) if index in chosen}
    blank = [index for index, (_, response) in found.items() if not response.strip()]
    if blank:
        raise ValueError(f"the responses {blank} of {rollouts.path}, which are among the best, have no text")
    return [found[index] for index in reversed(chosen)]
