"""Controlled decoding on tokens: the likeliest next tokens are ranked again, by the reward itself (ARGS) or by the value function (prefix scorer)."""

import contextlib
import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from recontrol.ambient import product_dtype
from recontrol.checks import integer, number, several
from recontrol.data.identity import fingerprint
from recontrol.data.rewards import as_reward, checked_rewards, reward_name
from recontrol.decoding.batches import eos_tokens
from recontrol.decoding.control import Control
from recontrol.decoding.controller import CACHE_NAMES
from recontrol.decoding.editing import check_fit
from recontrol.decoding.hooks import Attachment, forget_compiled, output_embedding, unfinished_rows
from recontrol.decoding.responses import decode_after
from recontrol.methods.base import Method, Training, one_score, tensors_checksum
from recontrol.methods.control import training_of
from recontrol.value import ValueFunction

logger = logging.getLogger("recontrol")


def rerank(k: int, bonus: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, scores: Tensor) -> Tensor:
    """score(v) = logit(v) + bonus(v) for the k likeliest next tokens v, minus infinity for all others; before temperature, top-k and top-p.

    `bonus` maps (rows, tokens) ids so far and (rows, k) candidates, the likeliest first, to (rows, k).
    """
    logits, candidates = scores.topk(min(k, scores.shape[-1]), dim=-1)
    added = bonus(input_ids, candidates).to(device=scores.device, dtype=scores.dtype)
    return torch.full_like(scores, -torch.inf).scatter(-1, candidates, logits + added)


@dataclass(frozen=True, eq=False)
class ARGS(Method):
    """score(v) = LM(v | x, y_<t) + w * r(x, y_<t v) for the k likeliest next tokens v, minus infinity for all others.

    LM is the logit. Greedy decoding takes the token of the highest score (ARGS-greedy); with `do_sample` one is drawn from the softmax of the k scores,
    divided by the temperature (ARGS-stochastic). The reward scores the caller's prompts with the response so far and the candidate behind it, up to
    rows * k texts in one call: equal ones once, responses that have ended not at all. With several scores r is their sum weighted by `weights`.
    Source: Khanov et al. 2024 (ARGS: Alignment as Reward-Guided Search), sections 2.1 (score) and 2.2 (greedy and stochastic choice).
    """

    kind = "ARGS"
    shown: ClassVar = {"w": "w", "k": "k", "weights": "weights"}
    reward: Any
    w: float = 1.0
    k: int = 10
    weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights = None if self.weights is None else tuple(number("weights", weight) for weight in several("weights", self.weights))
        for name, checked in {"reward": as_reward(self.reward), "w": number("w", self.w), "k": integer("k", self.k, 1), "weights": weights}.items():
            object.__setattr__(self, name, checked)
        # Raises, where the reward says how many scores it returns.
        one_score(torch.empty(0, len(getattr(self.reward, "head_names", None) or weights or [1])), weights, "weights")

    @property
    def identity(self) -> Any:
        """What the reward is called."""
        return reward_name(self.reward)

    @property
    def content(self) -> Any:
        """The reward's fingerprint."""
        return fingerprint(self.reward)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Yield the processor of one batch."""
        embedding = output_embedding(model)
        # Positions taken by the prompt, padding included: known at the first call.
        width: int | None = None

        def bonus(input_ids: Tensor, candidates: Tensor) -> Tensor:
            nonlocal width
            width = input_ids.shape[1] if width is None else width
            # Several rows may respond to one prompt.
            samples = len(input_ids) // len(prompts)
            keys, live = [], unfinished_rows(embedding)
            for row, (ids, tokens) in enumerate(zip(input_ids.tolist(), candidates.tolist(), strict=True)):
                written, response = ids[:width], ids[width:]
                going = tokens if live is None or live[row] else []
                texts = [decode_after(tokenizer, written, [*response, token], skip_special_tokens=True) for token in going]
                keys.append([(prompts[row // samples], text) for text in texts])
            distinct = list(dict.fromkeys(key for row in keys for key in row))
            rewards = one_score(checked_rewards(self.reward, *zip(*distinct, strict=True)), self.weights, "weights").tolist() if distinct else []
            score = dict(zip(distinct, rewards, strict=True))
            added = [[score[key] for key in row] or [0.0] * candidates.shape[1] for row in keys]
            return self.w * torch.tensor(added, dtype=torch.float32, device="cpu")

        yield [functools.partial(rerank, self.k, bonus)]


@dataclass(frozen=True, eq=False)
class PrefixScorer(Method):
    """score(v) = logit(v) + strength * V(o_{t+1} had v been chosen as y_t) for the k likeliest next tokens v, minus infinity for all others.

    With all tokens as candidates and V the expected reward, this samples from the distribution that maximises V - KL / strength at each step. V is in its
    own unit: where it is standardised, a strength of 1 is one logit for a standard deviation of the reward. A token that ends the response, which no state
    follows, gets V(o_t). A step costs one more forward call, of k positions a row, with the key/value cache of the generation; k calls over the whole
    text where the cache cannot be used (sliding windows, recurrent states). With several heads V is their sum weighted by `head_weights`. `trained` is the
    cost of training the value function, where it is known; `allow_other_model` accepts one that was trained on the states of another model.
    Source: Mudgal et al. 2024 (Controlled Decoding from Language Models), token-wise control with a prefix scorer (CD-FUDGE).
    """

    kind = "prefix scorer"
    shown: ClassVar = {"strength": "strength", "k": "k", "head_weights": "weights"}
    value: ValueFunction
    strength: float = 1.0
    k: int = 10
    head_weights: Sequence[float] | None = field(default=None, kw_only=True)
    allow_other_model: bool = field(default=False, kw_only=True)
    trained: Training | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        head_weights = Control(self.value, head_weights=self.head_weights).head_weights
        for name, checked in {"strength": number("strength", self.strength), "k": integer("k", self.k, 1), "head_weights": head_weights}.items():
            object.__setattr__(self, name, checked)

    @property
    def identity(self) -> str:
        """A checksum of the value function's weights."""
        return tensors_checksum(self.value.parameters())

    @property
    def training(self) -> Training:
        """As given, else the value function's parameters alone."""
        return self.trained or training_of(self.value)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Observe the forward calls inside the block and yield the processor of one batch."""
        ending = torch.tensor(sorted(eos_tokens(model, dict(options))), dtype=torch.int64)

        def values(states: Any) -> Tensor:
            heads = self.value(states)
            return heads[..., 0] if self.head_weights is None else (heads * heads.new_tensor(self.head_weights)).sum(-1)

        @torch.no_grad()
        def bonus(input_ids: Tensor, candidates: Tensor) -> Tensor:
            after, now = values(states.states(input_ids, candidates)), values(states.state)[:, None]
            return self.strength * torch.where(torch.isin(candidates, ending.to(candidates.device)), now, after)

        with CandidateStates(model) as states:
            check_fit(states, self.value, self.allow_other_model)
            yield [functools.partial(rerank, self.k, bonus)]


class CandidateStates(Attachment):
    """o_{t+1} had v been chosen as y_t, for each of k tokens v a row, computed between two forward calls of `generate`, for one batch of this thread.

    The k candidates go through the transformer together, as k positions in the same place: each attends to the text so far and itself. Their keys and
    values go into a shallow copy of the cache, so the generation continues bit-identically. Where that cannot be (see `_why_not`, `_disproof`) each
    candidate costs a forward call over the whole text, and the log says so. `state` is (rows, hidden_size), o_t before the edit of a `Controller`.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.decoder = self.owner.get_decoder()
        self.state: Tensor | None = None
        self.from_cache: bool | None = None
        self._call: dict[str, Any] = {}
        self._output: Tensor | None = None
        self._parameters = [*inspect.signature(type(self.decoder).forward).parameters][1:]
        self._thread = threading.get_ident()
        # The second one before a controller's hook, which edits the state.
        self._hooks.append(self.decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
        self._hooks.append(self.embedding.register_forward_pre_hook(self._before_embedding, prepend=True))
        forget_compiled()

    @torch.no_grad()
    def states(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """(rows, tokens) ids so far, (rows, k) candidates -> (rows, k, hidden_size), the states after each candidate."""
        if self.state is None:
            raise RuntimeError(f"this {type(self.owner).__name__} made no forward call since it was attached to: ask while it generates")
        with self.pause():
            real = self._real(input_ids)
            if self.from_cache is None:
                self._check_output()
                reason = self._why_not(input_ids) or self._disproof(input_ids, real, candidates)
                self.from_cache = reason is None
                if reason is not None:
                    logger.warning("each candidate token costs a forward call over the whole text, which is slow: %s", reason)
            return self._beside(real, candidates) if self.from_cache else self._whole(input_ids, real, candidates)

    def _after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._listening():
            self._call = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
            self._output = _last_hidden(output)[:, -1]

    def _before_embedding(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._listening():
            self.state = args[0][:, -1] if args[0].dim() == 3 else args[0]

    def _listening(self) -> bool:
        return not self._paused and threading.get_ident() == self._thread

    def _check_output(self) -> None:
        found, read = self._output, self.state
        # NaN propagates elsewhere.
        if found is None or read is None or found.shape != read.shape or not torch.equal(found.to(read.dtype).nan_to_num(), read.nan_to_num()):
            others = f"the output embedding of this {type(self.owner).__name__} reads other states than its {type(self.decoder).__name__} returns"
            raise ValueError(f"{others}: the states after candidate tokens cannot be had without computing logits")

    def _real(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens) bool, False where there is padding."""
        mask = self._call.get("attention_mask")
        if mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"wanted an attention mask of shape {tuple(input_ids.shape)}, found one {found}: static caches are not taken here")
        return mask.bool()

    def _why_not(self, input_ids: Tensor) -> str | None:
        """Why the cache cannot be used; None where it can."""
        cache = next((self._call[name] for name in CACHE_NAMES if self._call.get(name) is not None), None)
        if type(cache) is not DynamicCache or cache.offloading:
            return f"there is no plain key/value cache on the device, found {type(cache).__name__}"
        positions, attention = self._call.get("position_ids"), self.decoder.config._attn_implementation
        others = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        length = 0 if others else cache.get_seq_length()
        by_number = isinstance(positions, Tensor) and positions.dim() == 2 and not getattr(self.decoder.config, "alibi", False)
        reasons = (
            (others, f"the cache has layers of {', '.join(sorted(others))}"),
            (length != input_ids.shape[1], f"the cache holds {length} of {input_ids.shape[1]} positions"),
            (attention not in ("sdpa", "eager"), f"attention {attention!r} takes no mask of one's own"),
            (not by_number, f"positions of {type(self.decoder).__name__} are not given by number"),
        )
        return next((reason for found, reason in reasons if found), None)

    def _disproof(self, input_ids: Tensor, real: Tensor, candidates: Tensor) -> str | None:
        """Compare the states of one row with those of a forward call over the whole text; None where half of the digits agree."""
        row = int(real.sum(1).argmin())
        found = self._beside(real, candidates)[row].double()
        one = slice(row, row + 1)
        wanted = self._whole(input_ids[one], real[one], candidates[one])[0].double()
        error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
        # Kernels differ with the shape of what goes in, by some of the last digits in each layer.
        if error <= torch.finfo(product_dtype(self.dtype(), found.device)).eps ** 0.5:
            return None
        return f"{type(self.decoder).__name__} gives other states beside each other than one by one (relative error {error:.1e})"

    def _beside(self, real: Tensor, candidates: Tensor) -> Tensor:
        """One forward call of k positions a row, with the cache of the generation."""
        rows, k = candidates.shape
        # (rows, k, tokens + k): the text so far, and the candidate itself.
        own = torch.eye(k, dtype=torch.bool, device=real.device).expand(rows, k, k)
        seen = torch.cat([real[:, None].expand(rows, k, real.shape[1]), own], dim=-1)[:, None]
        if self.decoder.config._attn_implementation == "eager":
            dtype = self.dtype()
            seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        name, cache = next((name, self._call[name]) for name in CACHE_NAMES if self._call.get(name) is not None)
        # Layers replace their key and value tensors, so those of the generation do not change.
        beside = copy.copy(cache)
        beside.layers = [copy.copy(layer) for layer in cache.layers]
        positions = (self._call["position_ids"][:, -1:] + 1).expand(rows, k)
        return self._run(input_ids=candidates, attention_mask=seen, position_ids=positions, **{name: beside})

    def _whole(self, input_ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """Forward calls over the whole text without a cache, one for each column of candidates."""
        mask = torch.cat([real, torch.ones_like(real[:, :1])], dim=1).long()
        inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if self._call.get("position_ids") is not None:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        texts = [torch.cat([input_ids, column[:, None]], dim=1) for column in candidates.unbind(1)]
        return torch.stack([self._run(input_ids=text, **inputs)[:, -1] for text in texts], dim=1)

    def _run(self, **inputs: Any) -> Tensor:
        """Call the transformer as the generation calls it, but for the inputs."""
        kept = {name: option for name, option in self._call.items() if name not in CACHE_NAMES and not isinstance(option, Tensor)}
        return _last_hidden(self.decoder(**{**kept, **inputs}))


def _last_hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
