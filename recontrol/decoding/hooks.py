"""Hooks on a language model that are removed together, and the site in the model where states are read and edited."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recontrol.decoding.model_config import state_width

# What the key/value cache is called: the first name in newer releases of transformers, the others in older ones.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def output_embedding(model: Any) -> nn.Module:
    """The module that turns the last hidden state into logits; TypeError for what is no language model, ValueError for one that has none or an encoder."""
    if not isinstance(model, nn.Module) or not callable(getattr(model, "get_output_embeddings", None)):
        raise TypeError(f"a causal language model of transformers is wanted, one with get_output_embeddings(); found {type(model).__name__}")
    embedding = _embedding_of(model)
    if embedding is None:
        raise ValueError(f"{type(model).__name__}.get_output_embeddings() gives None: this model computes no logits over a vocabulary")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"a decoder-only language model is wanted, found {type(model).__name__}, which has an encoder")
    return embedding


def embedding_owner(model: nn.Module, embedding: nn.Module) -> Any:
    """The innermost model whose output embedding this is: what wrappers (of adapters, of the compiler) call in the end."""
    return [module for module in model.modules() if _embedding_of(module) is embedding][-1]


def input_width(model: Any, embedding: nn.Module) -> int:
    """The size of the states that the output embedding reads; it need not be the `hidden_size` of the config."""
    width, weight = getattr(embedding, "in_features", None), getattr(embedding, "weight", None)
    read = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else state_width(model.config)
    return width if isinstance(width, int) else read


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens: where accelerate runs it, if its weights are kept elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    kept = () if model.device.type != "meta" else (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in kept if device is not None), model.device))


def unfinished_rows(embedding: nn.Module) -> Tensor | None:
    """(rows,), which rows are unfinished to the `generate` that runs this output embedding's model in this thread, by its own variable; None outside of one."""
    frame = sys._getframe(1)
    while frame is not None and "unfinished_sequences" not in frame.f_code.co_varnames:
        frame = frame.f_back  # type: ignore[assignment]
    known = {} if frame is None else frame.f_locals
    found, model = known.get("unfinished_sequences"), known.get("self")
    return found.bool() if isinstance(found, Tensor) and isinstance(model, nn.Module) and _embedding_of(model) is embedding else None


@dataclass(frozen=True, eq=False)
class EditSite:
    """Where states are read and edited: an argument of the forward call of a module, by position, or by name where it is given so."""

    module: nn.Module
    position: int = 0
    name: str = "hidden_states"

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states among the arguments of a call."""
        return kwargs[self.name] if self.name in kwargs else args[self.position]

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with other states."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: states}
        return (*args[: self.position], states, *args[self.position + 1 :]), kwargs


class Attachment:
    """Hooks on one model (`owner`: the innermost), at a `site`, by default the input of its output embedding, removed together by `detach` or `with`."""

    def __init__(self, model: Any):
        self.model, self.embedding = model, output_embedding(model)
        self.owner, self.site = embedding_owner(model, self.embedding), EditSite(self.embedding)
        self._path = next((name for name, module in self.owner.named_modules() if module is self.embedding), "")
        self._hooks: list[RemovableHandle] = []
        self._paused = False

    def dtype(self) -> torch.dtype:
        """The dtype of the states that the output embedding reads."""
        weight = getattr(self.embedding, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else self.owner.dtype

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Remove the hooks; the model is as it was. May be called again."""
        if self._hooks:
            while self._hooks:
                self._hooks.pop().remove()
            forget_compiled()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the hooks in place without effect inside the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """For a copy of the model. A copy of the output embedding alone, as adapters make one, has hooks without effect: its owner is not copied."""
        copied = memo[id(self)] = copy.copy(self)
        copied.__dict__.update(copy.deepcopy(vars(self), memo) if id(self.owner) in memo else {"_hooks": [], "_paused": True})
        return copied

    def __enter__(self) -> Self:
        if not self.attached:
            raise RuntimeError(f"this {type(self).__name__} was detached; attach it again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attachments(module: nn.Module) -> list[Attachment]:
    """What has a hook before a module now; whatever edits states has one before the model that owns the output embedding."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment) and owner.attached]


def forget_compiled() -> None:
    """Make every compiled function be compiled again when it is next called: compiled code does not check which hooks a module has gained or lost."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A seed inside (None: the generators' present state), the caller's generators as they were outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _embedding_of(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        return getter() if callable(getter) else None
    return None
