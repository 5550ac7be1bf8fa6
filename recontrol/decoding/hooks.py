"""Hooks on a language model that are removed together, and the site in the model where states are read and edited."""

import contextlib
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
    """The module that turns the last hidden state into logits, `model.get_output_embeddings()`.

    Raises:
        TypeError: `model` is no language model of transformers.
        ValueError: it has no output embedding, or is not decoder-only.
    """
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
    width = getattr(embedding, "in_features", None)
    if isinstance(width, int):
        return width
    weight = getattr(embedding, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else state_width(model.config)


@dataclass(frozen=True, eq=False)
class EditSite:
    """Where states are read and edited: an argument of the forward call of a module.

    Attributes:
        module: reads the states.
        position: of the states among its positional arguments.
        name: of that argument when it is given by name.
    """

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
    """Hooks on one model, removed together by `detach`, at the end of a `with` block, or when attaching fails.

    Attributes:
        model: what was attached to.
        embedding: its output embedding.
        owner: the innermost model that the embedding belongs to.
        site: where states are read: the input of the output embedding, o_t.
    """

    def __init__(self, model: Any):
        self.model = model
        self.embedding = output_embedding(model)
        self.owner = embedding_owner(model, self.embedding)
        self.site = EditSite(self.embedding)
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

    def __enter__(self) -> Self:
        if not self.attached:
            raise RuntimeError(f"this {type(self).__name__} was detached; attach it again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attachments(module: nn.Module) -> list[Attachment]:
    """What has a hook before a module now; whatever edits states has one before the model that owns the output embedding."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]


def forget_compiled() -> None:
    """Make every compiled function be compiled again when it is next called.

    By default compiled code does not check whether a module has gained or lost hooks since. Which functions contain a model is not known, so all go.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _embedding_of(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        return getter()
    except NotImplementedError:
        return None
