"""What goes into a batched generation and what comes out of it, prompt by prompt."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from recontrol.checks import wide_dtype
from recontrol.decoding.config import Decoding
from recontrol.decoding.control import Control
from recontrol.decoding.controller import Controller
from recontrol.decoding.responses import Response

# (prompt, token) as there are tokens, and (prompt, None) when the response is finished.
Tokens = Generator[tuple[int, int | None], None, None]


@dataclass
class Trace:
    """What control did to one response; entry t of each list belongs to its token t.

    Args:
        value_before: V(o_t), with several heads their weighted sum.
        value_after: V(o_t + u_t).
        edit_norm: |u_t|, of the edit as the model read it, in the model's dtype.
        divergence: KL(p || q) in nats, of the next-token distribution p that was sampled from, before temperature and the like, and q without the edit.
    """

    value_before: list[float] = field(default_factory=list)
    value_after: list[float] = field(default_factory=list)
    edit_norm: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    def cut(self, tokens: int) -> "Trace":
        """The first entries, as many as there are tokens."""
        return Trace(*(entries[:tokens] for entries in vars(self).values()))


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
    """One token of the response to the prompt `index`; the last entry of a prompt has its finished response, and None for the token."""

    index: int
    token_id: int | None
    response: Generation | None


@dataclass(frozen=True, eq=False)
class BatchDecoding(Decoding):
    """A decoding, and what follows from the model and its tokenizer; `ends` says whether the newest token completes a stop string."""

    eos_ids: frozenset[int] = frozenset()
    pad_id: int = 0
    ends: Callable[[list[int]], bool] | None = None
    streaming: bool = False


def token_ids(tokenizer: Any, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The tokens of each prompt, texts tokenised; what is no text and no list of token ids is refused by place."""
    wanted = "prompts must be a list of texts, or of lists of token ids"
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(f"{wanted}, found {type(prompts).__name__}: {prompts!r:.40}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there are no prompts")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    tokenised = iter(tokenizer(texts).input_ids if texts else [])
    found = []
    for index, prompt in enumerate(prompts):
        ids = next(tokenised) if isinstance(prompt, str) else prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        listed: list[Any] = list(ids) if isinstance(ids, Iterable) else [None]
        if not all(isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0 for token in listed):
            raise TypeError(f"{wanted}, found {prompt!r:.60} at {index}")
        found.append([int(token) for token in listed])
    return found


def listed_controls(control: Control | Sequence[Control | None] | None, count: int, dtype: torch.dtype) -> list[Control | None]:
    """One control a prompt, from one for all or a list; `dtype` is that of the states."""
    several = isinstance(control, Sequence) and not isinstance(control, str)
    controls: list[Any] = [*control] if isinstance(control, Sequence) and several else [control] * count
    for index, given in enumerate(controls):
        # What else a controller is set to would have no effect here.
        if given is not None and (not isinstance(given, Control) or isinstance(given, Controller)):
            place = f" at {index}" if several else ""
            raise TypeError(f"control must be a recontrol.Control, None, or a list of them, one a prompt; found {type(given).__name__}{place}")
        if given is not None:
            given.check_range(wide_dtype(dtype), f" in the control of prompt {index}")
    if len(controls) != count:
        raise ValueError(f"there are {count} prompts, found {len(controls)} controls: give one for all, or one each")
    return controls
