"""The states after each of several candidate tokens, from the key/value cache of the running generation."""

import copy
import inspect
import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from recontrol.decoding.controller import CACHE_NAMES
from recontrol.decoding.hooks import Attachment, forget_compiled

logger = logging.getLogger("recontrol")


class CandidateStates(Attachment):
    """o_{t+1} had v been chosen as y_t, for each of k tokens v a row, computed between two forward calls of `generate`, for one batch of this thread.

    The k candidates go through the transformer together, as k positions in the same place: each attends to the prompt, the response so far and itself.
    Their keys and values go into a shallow copy of the cache, so the generation continues bit-identically. Recorders and controllers see nothing.

    This needs a `DynamicCache` without sliding windows or recurrent states, and attention "sdpa" or "eager". Otherwise, and where a check of one row at
    the first step fails, each candidate costs a forward call over the whole text; the log says so. `state` is (rows, hidden_size), o_t before the edit
    of a `Controller`; `from_cache` says whether the cache is used, None before the first call of `states`.
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
        # One model may run in several threads at once.
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

    def _cache(self) -> tuple[str, Any]:
        """The argument that holds the cache, and the cache; ("", None) without one."""
        return next(((name, self._call[name]) for name in CACHE_NAMES if self._call.get(name) is not None), ("", None))

    def _why_not(self, input_ids: Tensor) -> str | None:
        """Why the cache cannot be used; None where it can."""
        _, cache = self._cache()
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
        if error <= torch.finfo(self.dtype()).eps ** 0.5:
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
        name, cache = self._cache()
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
