"""Controlled decoding on tokens with a prefix scorer: the value function re-ranks the likeliest tokens."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import number
from recontrol.decoding.batches import eos_tokens
from recontrol.decoding.control import Control
from recontrol.decoding.editing import check_fit
from recontrol.methods.base import Method, Training, tensors_checksum
from recontrol.methods.candidates import CandidateStates
from recontrol.methods.control import training_of
from recontrol.methods.top_k import TopK, check_k
from recontrol.value import ValueFunction


@dataclass(frozen=True, eq=False)
class PrefixScorer(Method):
    """score(v) = logit(v) + strength * V(o_{t+1} had v been chosen as y_t) for the k likeliest next tokens v, minus infinity for all others.

    With all tokens as candidates and V the expected reward, this samples from the distribution that maximises V - KL / strength at each step. V is the
    value function of RE-Control in its own unit: where V is standardised, a strength of 1 is one logit for a standard deviation of the reward.

    No state follows a token that ends the response. Such a candidate gets V(o_t) of the state that it is sampled from: neither better nor worse than
    what is expected of the other tokens.

    A step costs one more forward call, of k positions a row, with the key/value cache of the generation; k forward calls over the whole text where the
    cache cannot be used (sliding windows, recurrent states).

    Args:
        value: the value function, on the model's device.
        strength: lambda, weight of the value against the logits; the larger, the further from the model.
        k: number of candidates.
        head_weights: (num_heads,) numbers, V is the weighted sum of the heads; required if there are several.
        allow_other_model: accept a value function that was trained on the states of another model.
        trained: what training the value function took, where it is known.

    Raises:
        TypeError: `value` is no value function, or a number is none.
        ValueError: `k` is not positive, a number is not finite, `head_weights` missing or of the wrong length.

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
        checked = {"strength": number("strength", self.strength), "k": check_k(self.k), "head_weights": head_weights}
        for name, argument in checked.items():
            object.__setattr__(self, name, argument)

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
        with CandidateStates(model) as candidates:
            check_fit(candidates, self.value, self.allow_other_model)
            yield [_PrefixScores(self, candidates, sorted(eos_tokens(model, dict(options))))]


class _PrefixScores(TopK):
    def __init__(self, method: PrefixScorer, states: CandidateStates, ending: Sequence[int]):
        super().__init__(method.k)
        self.method = method
        self.states = states
        self.ending = torch.tensor(ending, dtype=torch.int64)

    @torch.no_grad()
    def bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        after = self._values(self.states.states(input_ids, candidates))
        now = self._values(self.states.state)[:, None]
        return self.method.strength * torch.where(torch.isin(candidates, self.ending.to(candidates.device)), now, after)

    def _values(self, states: Any) -> Tensor:
        """(..., hidden_size) -> (...), the weighted sum of the heads."""
        values = self.method.value(states)
        weights = self.method.head_weights
        return values[..., 0] if weights is None else values @ values.new_tensor(weights)
