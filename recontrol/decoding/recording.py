"""Recording the hidden states that a model reads to sample its tokens."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from recontrol.decoding.hooks import Attachment, forget_compiled

_next_key = itertools.count(1)
_recorders: "weakref.WeakValueDictionary[int, HiddenStateRecorder]" = weakref.WeakValueDictionary()


class HiddenStateRecorder(Attachment):
    """Keeps, in a `with` block, the input of a model's output embedding at the last position of every forward call, compiled or not.

    `steps[t]`, (batch, hidden_size), is the state, before any edit, whose logits sample the new token y_t. Prompts must be padded on the left.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.steps: list[Tensor] = []
        self._key = next(_next_key)
        # Compiled code may drop an operation that changes nothing, so recording changes this count.
        with torch.inference_mode(False):
            self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        _recorders[self._key] = self
        # Before all other hooks of the output embedding.
        self._hooks.append(self.site.module.register_forward_pre_hook(self._before_site, prepend=True, with_kwargs=True))
        forget_compiled()

    def clear(self) -> None:
        """Forget the states recorded so far."""
        self.steps.clear()

    def _before_site(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        hidden = self.site.states(args, kwargs)
        last = hidden[:, -1] if hidden.dim() == 3 else hidden
        if torch.compiler.is_compiling():
            torch.ops.recontrol.record(last, self._calls, self._key)
        else:
            # A copy that one can train on, also where the model runs under inference_mode.
            with torch.inference_mode(False):
                self.steps.append(last.detach().clone())


record_hidden_states = HiddenStateRecorder


# Opaque to the compiler, and never part of a CUDA graph, whose replay would run no Python.
@torch.library.custom_op("recontrol::record", mutates_args=("calls",), tags=(torch.Tag.cudagraph_unsafe,))
def _record(hidden: Tensor, calls: Tensor, key: int) -> None:
    calls.add_(1)
    if (recorder := _recorders.get(key)) is not None:
        with torch.inference_mode(False):
            recorder.steps.append(hidden.detach().clone())


@_record.register_fake
def _(hidden: Tensor, calls: Tensor, key: int) -> None:
    return None
