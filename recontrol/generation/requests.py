"""What goes into a batched generation and what comes out of it, prompt by prompt."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from recontrol.checks import first_few
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control
from recontrol.decoding.controller import Controller
from recontrol.decoding.responses import Response


@dataclass
class Trace:
    """What control did to one response; entry t of each list belongs to its token t.

    Args:
        value_before: V(o_t), with several heads their weighted sum.
        value_after: V(o_t + u_t).
        edit_norm: |u_t|, of the edit as the model read it, in the model's dtype.
        divergence: KL(p || q) in nats, of the next-token distribution p that was sampled from, before temperature and the like, and the one
            without the edit, q.
    """

    value_before: list[float] = field(default_factory=list)
    value_after: list[float] = field(default_factory=list)
    edit_norm: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    def add_edit(self, value_before: float, value_after: float, edit_norm: float) -> None:
        """Add what the edit of one more state did."""
        self.value_before.append(value_before)
        self.value_after.append(value_after)
        self.edit_norm.append(edit_norm)

    def cut(self, tokens: int) -> "Trace":
        """The first entries, as many as there are tokens."""
        return Trace(self.value_before[:tokens], self.value_after[:tokens], self.edit_norm[:tokens], self.divergence[:tokens])


@dataclass
class Generation(Response):
    """One response of `recontrol.generate`.

    Args:
        token_ids: the tokens kept; the end-of-sequence token, if there is one, is the last.
        text: what the tokens add to the prompt's text, without special tokens.
        finish: "eos", "length" (cut at the most tokens allowed) or "stop" (cut before a stop string).
        batching: "continuous" or "static", how the prompt was batched with others.
        trace: what control did, where it was asked for and the prompt has a control; else None.
    """

    batching: str
    trace: Trace | None = None


@dataclass(frozen=True)
class StreamedToken:
    """One token of a response that is under way.

    Attributes:
        index: of the prompt.
        token_id: the token; None in the last entry of a prompt, which has its response.
        response: the finished response in the last entry of a prompt; else None.
    """

    index: int
    token_id: int | None
    response: Generation | None


@dataclass(frozen=True, eq=False)
class BatchDecoding(Decoding):
    """A decoding, and what follows from the model and its tokenizer."""

    eos_ids: frozenset[int] = frozenset()
    pad_id: int = 0
    # Whether the newest token completes a stop string; None without stop strings.
    ends: Callable[[list[int]], bool] | None = None
    # Whether tokens are handed over as they come.
    streaming: bool = False


def token_ids(tokenizer: Any, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The tokens of each prompt, texts tokenised; what is no text and no list of token ids, or empty, is refused by place."""
    wanted = "prompts must be a list of texts, or of lists of token ids"
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(f"{wanted}, found {type(prompts).__name__}: {prompts!r:.40}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there are no prompts")
    texts = [index for index, prompt in enumerate(prompts) if isinstance(prompt, str)]
    tokenised = dict(zip(texts, tokenizer([prompts[index] for index in texts]).input_ids if texts else [], strict=True))
    found = []
    for index, prompt in enumerate(prompts):
        ids = tokenised[index] if index in tokenised else prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        listed: list[Any] = list(ids) if isinstance(ids, Iterable) else [None]
        if not all(isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0 for token in listed):
            raise TypeError(f"{wanted}, found {prompt!r:.60} at {index}")
        found.append([int(token) for token in listed])
    empty = [index for index, ids in enumerate(found) if not ids]
    if empty:
        raise ValueError(f"{len(empty)} prompts have no tokens: {first_few(empty)}")
    return found


def listed_controls(control: Control | Sequence[Control | None] | None, count: int) -> list[Control | None]:
    """One control a prompt, from one for all or a list."""
    several = isinstance(control, Sequence) and not isinstance(control, str)
    controls: list[Any] = list(control) if isinstance(control, Sequence) and several else [control] * count
    for index, given in enumerate(controls):
        # What else a controller is set to would have no effect here.
        if given is not None and (not isinstance(given, Control) or isinstance(given, Controller)):
            place = f" at {index}" if several else ""
            raise TypeError(f"control must be a recontrol.Control, None, or a list of them, one a prompt; found {type(given).__name__}{place}")
    if len(controls) != count:
        raise ValueError(f"there are {count} prompts, found {len(controls)} controls: give one for all, or one each")
    return controls
