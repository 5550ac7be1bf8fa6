"""Sampling several responses to a prompt and keeping the one with the largest reward."""

import dataclasses
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from recontrol.checks import integer
from recontrol.data.identity import fingerprint
from recontrol.data.rewards import as_reward, checked_rewards
from recontrol.decoding.batches import Batch, check_options, effective, greedy_unless_asked
from recontrol.decoding.config import Decoding
from recontrol.decoding.responses import Response
from recontrol.methods.base import Method, Uncontrolled, one_score


@dataclass(frozen=True, eq=False)
class BestOfN(Method):
    """y = argmax_{i <= n} r(y_i), y_1 ... y_n sampled independently by `inner`: the first of equals is kept. Costs n times the decoding, and the reward.

    The reward is as for `collect`; `head_weights` weigh several. At most `rows_at_once` responses are decoded at once, but one to each prompt (None: all);
    another number gives other samples. `sampling` are options of `model.generate` in the place of a comparison's, do_sample=True where that is greedy.
    Source: Stiennon et al. 2020 (as a comparison to fine-tuning).
    """

    shown: ClassVar = {"n": "samples"}
    n: int
    reward: Any
    inner: Method = field(default_factory=Uncontrolled)
    head_weights: Sequence[float] | None = field(default=None, kw_only=True)
    rows_at_once: int | None = field(default=None, kw_only=True)
    sampling: Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, given in (("n", self.n), ("rows_at_once", self.rows_at_once)):
            if given is not None:
                integer(name, given, 1)
        if not isinstance(self.inner, Method):
            raise TypeError(f"inner must be a method, found {type(self.inner).__name__}")
        if type(self.inner).respond is not Method.respond:
            raise ValueError(f"{self.inner.label} chooses between responses on its own: give one that makes each of them")
        object.__setattr__(self, "reward", as_reward(self.reward))

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Best-of-n, and what each response is made by."""
        return "best-of-n" if isinstance(self.inner, Uncontrolled) else f"best-of-n + {self.inner.kind}"

    @property
    def parts(self) -> Sequence[Method]:
        """The inner method."""
        return (self.inner,)

    @property
    def identity(self) -> Any:
        """What else the responses depend on."""
        weights, sampling = self.head_weights, self.sampling
        return [self.inner.identity, self.rows_at_once, None if weights is None else list(weights), None if sampling is None else dict(sampling)]

    @property
    def content(self) -> Any:
        """The fingerprint of the reward, and that of the inner method's."""
        return [self.inner.content, fingerprint(self.reward)]

    @property
    def divergence(self) -> float | None:
        """Log n - (n - 1) / n, an upper bound of the KL (Beirami et al. 2024); None where the inner method is not the uncontrolled model."""
        return math.log(self.n) - (self.n - 1) / self.n if isinstance(self.inner, Uncontrolled) else None

    def respond(self, model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding | None = None, **keywords: Any) -> Batch:
        """Sample n responses to each prompt and keep the best; `steps` are those of all rounds, `seconds` include the scoring."""
        decoding = Decoding.of(Decoding.of(decoding, **keywords), **(self.sampling or {}))
        options = dict(decoding.options)
        check_options(options)
        if not prompts:
            raise ValueError("there are no prompts")
        if effective(model, options, "num_return_sequences") not in (None, 1):
            raise ValueError("num_return_sequences must be left at 1: how many responses are sampled is n")
        if self.n > 1 and not effective(model, {**greedy_unless_asked(options), **options}, "do_sample"):
            raise ValueError(f"best of {self.n} wants sampling, found greedy decoding, whose responses to a prompt are all the same: give do_sample=True")
        at_once = self.n if self.rows_at_once is None else min(self.n, max(1, self.rows_at_once // len(prompts)))
        samples: list[list[Response]] = [[] for _ in prompts]
        rounds = []
        for start in range(0, self.n, at_once):
            count = min(at_once, self.n - start)
            repeated = [prompt for prompt in prompts for _ in range(count)]
            # First the caller's own seed, then others than those of neighbouring batches.
            seed = zlib.crc32(f"{decoding.seed} {start}".encode()) if start else decoding.seed
            rounds.append(self.inner.respond(model, tokenizer, repeated, dataclasses.replace(decoding, seed=seed)))
            for place, of_prompt in enumerate(samples):
                of_prompt += rounds[-1].responses[place * count : (place + 1) * count]
        began = time.perf_counter()
        texts = [response.text for of_prompt in samples for response in of_prompt]
        rewards = checked_rewards(self.reward, [prompt for prompt in prompts for _ in range(self.n)], texts)
        best = one_score(rewards, self.head_weights).reshape(len(prompts), self.n).argmax(1).tolist()
        seconds = sum(made.seconds for made in rounds) + time.perf_counter() - began
        return Batch([of_prompt[choice] for of_prompt, choice in zip(samples, best, strict=True)], sum(made.steps for made in rounds), seconds)
