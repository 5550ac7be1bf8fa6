"""Decoding under control: a hook that edits the input of a language model's output embedding."""

import functools
import inspect
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recontrol.ascent import backends
from recontrol.ascent.arguments import normalise
from recontrol.ascent.ascend import ascend
from recontrol.checks import integer, several
from recontrol.decoding.control import check_settings
from recontrol.decoding.editing import Editing, check_fit
from recontrol.value import ValueFunction

# What the key/value cache is called: the first name in newer releases of transformers, the others in older ones.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@dataclass(frozen=True, eq=False)
class Controller:
    """Adds a control signal to the state that is read to sample each token: y_t ~ softmax(W_lm (o_t + u_t)).

    u_t comes from `recontrol.ascend` on o_t, the hidden state after the final norm at the position whose logits sample
    y_t; the key/value cache is not touched. Only positions whose logits are computed are edited: with `generate`, one row
    a sequence, at prefill too.

    Rows that are finished are not edited: at a decode step (one token a row goes in, and the cache is not empty) those
    whose input token is one of `stop_token_ids`. Without a cache (`use_cache=False`) finished rows cannot be told.

    Args:
        value: the value function to climb, on the model's device; its dtype may be another than the model's.
        step_size: alpha >= 0.
        steps: n >= 0; with 0 nothing is edited.
        radius: cut the edit where its norm reaches this.
        target: climb towards this value instead of upward, in V's own unit: where V is standardised, `value.from_reward` makes it of rewards.
        head_weights: (num_heads,) numbers, the objective is the weighted sum of the heads; required if there are several.
        backend: as for `recontrol.ascend`.
        stop_token_ids: tokens after which a row is finished; by default the model's end-of-sequence tokens and its padding.
            Name here what you give `generate` as `eos_token_id` or `pad_token_id`. `()`: rows are never finished.
        allow_other_model: attach although `value` was trained on the states of another model.
        self_check: prove at attach, by running the model on one token three times, that edits reach the logits.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number that is NaN, infinite or (but for `target` and `head_weights`) negative, an unknown backend,
            `head_weights` missing or of the wrong length.

    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """

    value: ValueFunction
    step_size: float = 0.5
    steps: int = 30
    radius: float | None = field(default=None, kw_only=True)
    target: float | None = field(default=None, kw_only=True)
    head_weights: Sequence[float] | None = field(default=None, kw_only=True)
    backend: str = field(default="auto", kw_only=True)
    stop_token_ids: Sequence[int] | None = field(default=None, kw_only=True)
    allow_other_model: bool = field(default=False, kw_only=True)
    self_check: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "backend", backends.check_name(self.backend))
        if self.stop_token_ids is not None:
            tokens = tuple(integer("stop_token_ids", token) for token in several("stop_token_ids", self.stop_token_ids))
            object.__setattr__(self, "stop_token_ids", tokens)

    def attach(self, model: Any) -> "Handle":
        """Put the hooks in place; `with controller.attach(model) as handle: model.generate(...)` removes them at the end.

        Compiled functions are compiled again when they are next called, after attaching and after detaching.

        Args:
            model: a causal language model of transformers, compiled or not; for a pipeline, its `model`.

        Returns:
            The handle, already attached.

        Raises:
            TypeError: `model` is no language model, or float64 meets another dtype.
            ValueError: `value` is for another hidden size, on another device, or trained for another model.
            RuntimeError: a controller is attached already, the backend cannot run here, or edits do not reach the logits.
        """
        return Handle(self, model)


class _DecodeStep(NamedTuple):
    """What a forward call of one token a row is known by.

    Attributes:
        ids: (batch, 1), the tokens that go in.
        cache: the key/value cache where its length is on the device, None where it is known to hold tokens.
    """

    ids: Tensor
    cache: Any | None


class _ThreadState(threading.local):
    """What is known of the forward call that this thread is in; one model may run in several threads at once."""

    def __init__(self) -> None:
        self.step: _DecodeStep | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # So that a controlled model can be copied.
        return (_ThreadState, ())


class Handle(Editing):
    """The hooks of one controller on one model, made by `Controller.attach`; `detach` or leaving its `with` block removes them.

    Args:
        controller: what to do with the states.
        model: the model.

    Attributes:
        controller: as given.
        stop_token_ids: the tokens after which a row is finished.

    Raises:
        TypeError, ValueError, RuntimeError: as `Controller.attach`.
    """

    def __init__(self, controller: Controller, model: Any):
        super().__init__(model)
        self.controller = controller
        self.stop_token_ids = _stop_token_ids(self.owner) if controller.stop_token_ids is None else tuple(controller.stop_token_ids)
        check_fit(self, controller.value, controller.allow_other_model)
        # From the class, because an instance's forward may be a compiled one.
        self._parameters = [*inspect.signature(type(self.owner).forward).parameters][1:]
        self._thread = _ThreadState()
        self._traced: tuple[_DecodeStep | None] | None = None
        # Both on the device, so that a decode step waits for nothing and can be captured in a CUDA graph; no inference tensors, so
        # that states can be counted in any mode.
        with torch.inference_mode(False):
            self._count = torch.zeros((), dtype=torch.int64, device=controller.value.device)
            wide = torch.float64 if controller.value.dtype == torch.float64 else torch.float32
            weights = controller.head_weights
            self._head_weights = None if weights is None else torch.tensor(weights, dtype=wide, device=controller.value.device)
        # A backend that cannot run says so here, and what it precomputes from the weights is ready.
        self._ascend(torch.zeros(1, controller.value.hidden_size, dtype=self.dtype(), device=controller.value.device), None)
        with self._attaching(self_check=controller.self_check):
            self._hooks.append(self.owner.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._hooks.append(self.owner.register_forward_hook(self._after_model, always_call=True))
            self._hooks.append(self.embedding.register_forward_pre_hook(self._before_embedding))

    @property
    def edited_rows(self) -> int:
        """How many states were edited so far, finished rows not counted; reading it waits for the device."""
        return int(self._count)

    def backend(self, rows: int) -> str:
        """The name of the backend that climbs from this many states: the controller's, or what "auto" takes for them."""
        hidden = torch.zeros(rows, self.controller.value.hidden_size, dtype=self.dtype(), device=self.controller.value.device)
        chosen = self.controller
        arguments = normalise(hidden, chosen.value, chosen.step_size, chosen.steps, None, chosen.radius, chosen.target, self._head_weights)
        return backends.choose(chosen.backend, arguments, chosen.value.prepared()).name

    def _before_model(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # No arithmetic here: the compiler makes a graph of its own of a hook on the model that it compiles.
        step = self._decode_step(args, kwargs)
        # The compiler follows attributes, but not what each thread keeps for itself; what it compiles whole no other thread disturbs.
        if torch.compiler.is_compiling():
            self._traced = (step,)
        else:
            self._traced, self._thread.step = None, step

    def _after_model(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Also after an error: the step belongs to one forward call.
        self._traced = None
        if not torch.compiler.is_compiling():
            self._thread.step = None

    def _before_embedding(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if self._sign is not None:
            return (hidden * self._sign, *args[1:])
        if self._paused or self.controller.steps == 0:
            return None
        rows = hidden.reshape(-1, hidden.shape[-1])
        step = self._thread.step if self._traced is None else self._traced[0]
        # Tokens of another number are not those of these rows.
        mask = self._live_rows(step).to(rows.device) if step is not None and step.ids.shape[0] == rows.shape[0] else None
        edited = self._ascend(rows, mask)
        self._count.add_(rows.shape[0] if mask is None else mask.sum())
        return (edited.reshape(hidden.shape), *args[1:])

    def _ascend(self, rows: Tensor, mask: Tensor | None) -> Any:
        chosen = self.controller
        return ascend(
            rows,
            chosen.value,
            chosen.step_size,
            chosen.steps,
            mask=mask,
            radius=chosen.radius,
            target=chosen.target,
            head_weights=self._head_weights,
            backend=chosen.backend,
        )

    def _decode_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _DecodeStep | None:
        """The decode step that begins with these arguments of the model; None at prefill, where every row is live."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if not self.stop_token_ids or cache is None or ids is None or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        filled = _filled(cache)
        if isinstance(filled, Tensor):
            return _DecodeStep(ids, cache)
        return _DecodeStep(ids, None) if filled else None

    def _live_rows(self, step: _DecodeStep) -> Tensor:
        """(batch,) bool, False where the row's response ended before; asked when all layers have put the token into the cache."""
        finished = functools.reduce(operator.or_, (step.ids[:, 0] == token for token in self.stop_token_ids))
        if step.cache is None:
            return ~finished
        # A static cache keeps its length on the device; it is not read here, which would wait for the device.
        return ~(finished & (step.cache.get_seq_length() > 1).to(step.ids.device))


def _filled(cache: Any) -> bool | Tensor:
    """Whether a cache holds tokens; where it keeps its length on the device, that length."""
    try:
        length = cache.get_seq_length()
    except ValueError:
        # A cache of recurrent states only has no length.
        return cache.has_previous_state()
    return length if isinstance(length, Tensor) else length > 0


def _stop_token_ids(owner: Any) -> tuple[int, ...]:
    """The end-of-sequence tokens of the generation config and the padding token."""
    config = getattr(owner, "generation_config", None) or owner.config.get_text_config()
    found = [getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)]
    return tuple(dict.fromkeys(int(token) for given in found if given is not None for token in torch.as_tensor(given).flatten()))
