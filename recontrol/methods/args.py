"""Controlled decoding on tokens with the reward itself: ARGS, alignment as reward-guided search."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recontrol.checks import number, several
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.decoding.batches import finishing_tokens
from recontrol.decoding.responses import decode_after
from recontrol.methods.base import Method, one_score
from recontrol.methods.top_k import TopK, check_k


@dataclass(frozen=True, eq=False)
class ARGS(Method):
    """score(v) = LM(v | x, y_<t) + w * r(x, y_<t v) for the k likeliest next tokens v, minus infinity for all others.

    LM is the logit, as in the code released with the paper; log-probabilities would give the same tokens. Greedy decoding takes the token of the highest
    score (ARGS-greedy); with `do_sample` one is drawn from the softmax of the k scores, divided by the temperature (ARGS-stochastic). Top-k and top-p
    of the sampling apply to these k scores.

    The reward scores the caller's prompts with the response so far and the candidate behind it. That text may end in the middle of a word or, with
    byte-level tokens, of a character, which a reward model has not seen in training. Equal texts are scored once; responses that have ended are not scored.

    A step costs up to (rows * k) rewards in one call: the batch size of a `RewardModel` bounds how many are scored at once.

    Args:
        reward: a callable (prompts, responses) -> scores, or what else `recontrol.collect` takes as the reward.
        w: weight of the reward against the logits.
        k: number of candidates.
        weights: one number a score, r is the weighted sum; required where the reward returns several scores.

    Raises:
        TypeError: `reward` is no reward, or a number is none.
        ValueError: `k` is not positive, a number is not finite, or there are not as many weights as scores.

    Source: Khanov et al. 2024 (ARGS: Alignment as Reward-Guided Search), sections 2.1 (score) and 2.2 (greedy and stochastic choice).
    """

    kind = "ARGS"
    reward: Any
    w: float = 1.0
    k: int = 10
    weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights = None if self.weights is None else tuple(number("weights", weight) for weight in several("weights", self.weights))
        checked = {"reward": as_reward(self.reward), "w": number("w", self.w), "k": check_k(self.k), "weights": weights}
        for name, argument in checked.items():
            object.__setattr__(self, name, argument)
        named = getattr(self.reward, "head_names", None)
        if named:
            _check_weights(weights, len(named))

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
        yield [_RewardGuided(self, tokenizer, prompts, finishing_tokens(model, tokenizer, dict(options)))]


class _RewardGuided(TopK):
    def __init__(self, method: ARGS, tokenizer: Any, prompts: Sequence[str], finishing: Collection[int]):
        super().__init__(method.k)
        self.method = method
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.finishing = finishing
        # Positions taken by the prompt, padding included: known at the first call.
        self.width: int | None = None

    def bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        if self.width is None:
            self.width = input_ids.shape[1]
        # Several rows may respond to one prompt.
        samples = len(input_ids) // len(self.prompts)
        found: dict[tuple[str, str], int] = {}
        places = []
        for row, (ids, options) in enumerate(zip(input_ids.tolist(), candidates.tolist(), strict=True)):
            written, response = ids[: self.width], ids[self.width :]
            if response and response[-1] in self.finishing:
                continue
            for column, token in enumerate(options):
                text = decode_after(self.tokenizer, written, [*response, token], skip_special_tokens=True)
                places.append((row, column, found.setdefault((self.prompts[row // samples], text), len(found))))
        bonus = torch.zeros(candidates.shape)
        if places:
            rows, columns, texts = torch.tensor(places).unbind(-1)
            bonus[rows, columns] = self.method.w * self._rewards(list(found))[texts]
        return bonus

    def _rewards(self, pairs: list[tuple[str, str]]) -> Tensor:
        table = checked_rewards(self.method.reward, [prompt for prompt, _ in pairs], [response for _, response in pairs])
        _check_weights(self.method.weights, table.shape[1])
        return one_score(table, self.method.weights).float()


def _check_weights(weights: Sequence[float] | None, scores: int) -> None:
    if len(weights or [1.0]) != scores:
        found = "none" if weights is None else str(len(weights))
        raise ValueError(f"the reward returns {scores} scores a response: found {found} for weights, wanted {scores} numbers")
