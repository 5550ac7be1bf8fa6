"""Controlled decoding on tokens: the likeliest next tokens are ranked again, by the reward itself (ARGS) or by the value function (prefix scorer)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import integer, number, several
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.decoding.batches import eos_tokens, finishing_tokens
from recontrol.decoding.control import Control
from recontrol.decoding.editing import check_fit
from recontrol.decoding.responses import decode_after
from recontrol.methods.base import Method, Training, one_score, tensors_checksum
from recontrol.methods.candidates import CandidateStates
from recontrol.methods.control import training_of
from recontrol.value import ValueFunction


class TopK(LogitsProcessor):
    """score(v) = logit(v) + bonus(v) for the k likeliest next tokens v, minus infinity for all others; before temperature, top-k and top-p.

    `bonus` maps (rows, tokens) ids so far and (rows, k) candidates, the likeliest first, to (rows, k).
    """

    def __init__(self, k: int, bonus: Callable[[Tensor, Tensor], Tensor]):
        self.k, self.bonus = k, bonus

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) ids so far, (rows, vocabulary) logits -> (rows, vocabulary) scores."""
        logits, candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        bonus = self.bonus(input_ids, candidates).to(device=scores.device, dtype=scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(-1, candidates, logits + bonus)


@dataclass(frozen=True, eq=False)
class ARGS(Method):
    """score(v) = LM(v | x, y_<t) + w * r(x, y_<t v) for the k likeliest next tokens v, minus infinity for all others.

    LM is the logit, as in the code released with the paper. Greedy decoding takes the token of the highest score (ARGS-greedy); with `do_sample` one is
    drawn from the softmax of the k scores, divided by the temperature (ARGS-stochastic). The reward scores the caller's prompts with the response so far
    and the candidate behind it, up to rows * k texts in one call: equal ones once, responses that have ended not at all.

    Args:
        reward: a callable (prompts, responses) -> scores, or what else `recontrol.collect` takes as the reward.
        w: weight of the reward against the logits.
        k: number of candidates.
        weights: one number a score, r is the weighted sum; required where the reward returns several scores.

    Raises:
        TypeError, ValueError: `reward` is no reward, a number is none or not finite, `k` is not positive, or there are not as many weights as scores.

    Source: Khanov et al. 2024 (ARGS: Alignment as Reward-Guided Search), sections 2.1 (score) and 2.2 (greedy and stochastic choice).
    """

    kind = "ARGS"
    reward: Any
    w: float = 1.0
    k: int = 10
    weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights = None if self.weights is None else tuple(number("weights", weight) for weight in several("weights", self.weights))
        for name, checked in {"reward": as_reward(self.reward), "w": number("w", self.w), "k": _checked_k(self.k), "weights": weights}.items():
            object.__setattr__(self, name, checked)
        # Raises, where the reward says how many scores it returns.
        one_score(torch.zeros(0, len(getattr(self.reward, "head_names", None) or weights or [1])), weights, "weights")

    @property
    def settings(self) -> dict[str, Any]:
        """Weight of the reward, candidates, and the weights of several scores."""
        return {"w": self.w, "k": self.k, **({} if self.weights is None else {"weights": self.weights})}

    @property
    def identity(self) -> Any:
        """What the reward is called."""
        return reward_name(self.reward)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Yield the processor of one batch."""
        finishing = finishing_tokens(model, tokenizer, dict(options))
        # Positions taken by the prompt, padding included: known at the first call.
        width: int | None = None

        def bonus(input_ids: Tensor, candidates: Tensor) -> Tensor:
            nonlocal width
            width = input_ids.shape[1] if width is None else width
            # Several rows may respond to one prompt.
            samples = len(input_ids) // len(prompts)
            found: dict[tuple[str, str], int] = {}
            places = []
            for row, (ids, tokens) in enumerate(zip(input_ids.tolist(), candidates.tolist(), strict=True)):
                written, response = ids[:width], ids[width:]
                for column, token in enumerate([] if response and response[-1] in finishing else tokens):
                    text = decode_after(tokenizer, written, [*response, token], skip_special_tokens=True)
                    places.append((row, column, found.setdefault((prompts[row // samples], text), len(found))))
            added = torch.zeros(candidates.shape)
            if places:
                rows, columns, texts = torch.tensor(places).unbind(-1)
                rewards = one_score(checked_rewards(self.reward, *zip(*found, strict=True)), self.weights, "weights")
                added[rows, columns] = self.w * rewards.float()[texts]
            return added

        yield [TopK(self.k, bonus)]


@dataclass(frozen=True, eq=False)
class PrefixScorer(Method):
    """score(v) = logit(v) + strength * V(o_{t+1} had v been chosen as y_t) for the k likeliest next tokens v, minus infinity for all others.

    With all tokens as candidates and V the expected reward, this samples from the distribution that maximises V - KL / strength at each step. V is in its
    own unit: where it is standardised, a strength of 1 is one logit for a standard deviation of the reward. A token that ends the response, which no state
    follows, gets V(o_t). A step costs one more forward call, of k positions a row, with the key/value cache of the generation; k calls over the whole
    text where the cache cannot be used (sliding windows, recurrent states).

    Args:
        value: the value function, on the model's device.
        strength: lambda, weight of the value against the logits; the larger, the further from the model.
        k: number of candidates.
        head_weights: (num_heads,) numbers, V is the weighted sum of the heads; required if there are several.
        allow_other_model: accept a value function that was trained on the states of another model.
        trained: the cost of training the value function, where it is known.

    Raises:
        TypeError, ValueError: `value` is no value function, a number is none or not finite, `k` is not positive, or `head_weights` do not fit.

    Source: Mudgal et al. 2024 (Controlled Decoding from Language Models), token-wise control with a prefix scorer (CD-FUDGE).
    """

    kind = "prefix scorer"
    value: ValueFunction
    strength: float = 1.0
    k: int = 10
    head_weights: Sequence[float] | None = field(default=None, kw_only=True)
    allow_other_model: bool = field(default=False, kw_only=True)
    trained: Training | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # The same checks of the value function and its heads as for an ascent.
        head_weights = Control(self.value, head_weights=self.head_weights).head_weights
        for name, checked in {"strength": number("strength", self.strength), "k": _checked_k(self.k), "head_weights": head_weights}.items():
            object.__setattr__(self, name, checked)

    @property
    def settings(self) -> dict[str, Any]:
        """Strength, candidates, and the weights of several heads."""
        return {"strength": self.strength, "k": self.k, **({} if self.head_weights is None else {"weights": self.head_weights})}

    @property
    def identity(self) -> str:
        """A checksum of the value function's weights."""
        return tensors_checksum(self.value.parameters())

    @property
    def training(self) -> Training:
        """As given, else the value function's parameters alone."""
        return self.trained or training_of(self.value)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Observe the forward calls inside the block and yield the processor of one batch."""
        ending = torch.tensor(sorted(eos_tokens(model, dict(options))), dtype=torch.int64)

        def values(states: Any) -> Tensor:
            heads = self.value(states)
            return heads[..., 0] if self.head_weights is None else heads @ heads.new_tensor(self.head_weights)

        @torch.no_grad()
        def bonus(input_ids: Tensor, candidates: Tensor) -> Tensor:
            after, now = values(states.states(input_ids, candidates)), values(states.state)[:, None]
            return self.strength * torch.where(torch.isin(candidates, ending.to(candidates.device)), now, after)

        with CandidateStates(model) as states:
            check_fit(states, self.value, self.allow_other_model)
            yield [TopK(self.k, bonus)]


def _checked_k(k: int) -> int:
    """The number of candidates, an integer of at least 1."""
    if integer("k", k) < 1:
        raise ValueError(f"k must be 1 or more, found {k!r}")
    return int(k)
