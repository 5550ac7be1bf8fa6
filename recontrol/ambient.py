"""What a caller has set in torch: kept out of what must not depend on it, and carried into the threads where it should hold."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(kind))
_backends: Any = torch.backends
# Where it is set how exact products of float32 are, and what is exact; before torch 2.9 there is one such place, for GPUs.
_MODERN = [(_backends.cuda.matmul, "fp32_precision", "ieee"), (_backends.mkldnn.matmul, "fp32_precision", "ieee")]
_EXACT: list[tuple[Any, str, Any]] = _MODERN if hasattr(_backends, "fp32_precision") else [(_backends.cuda.matmul, "allow_tf32", False)]
# The caller's settings, once for each thread that is inside `_exact`; they belong to all threads.
_before: list[list[Any]] = []
_lock = threading.Lock()


@contextlib.contextmanager
def shielded(gradients: bool = False) -> Iterator[None]:
    """Inside, nothing depends on the caller's autocast, TF32, inference mode, default device or mode of gradients; allocations name their dtype themselves."""
    with contextlib.ExitStack() as stack:
        # Always, for it also lets gradients be recorded inside an operator.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind in filter(torch.is_autocast_enabled, AUTOCAST):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if _before or any(getattr(owner, name) not in ("none", exact) for owner, name, exact in _EXACT):
            stack.enter_context(_exact())
        yield


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 without TF32 or bfloat16 until the last thread that wants them is done."""
    with _lock:
        _before.append(_before[0] if _before else [getattr(owner, name) for owner, name, _ in _EXACT])
        for owner, name, exact in _EXACT:
            setattr(owner, name, exact)
    try:
        yield
    finally:
        with _lock:
            settings = _before.pop()
            for (owner, name, _), before in zip(_EXACT, () if _before else settings, strict=False):
                setattr(owner, name, before)


def carried(function: Callable) -> Callable:
    """The function, for another thread: it runs under the autocast, the modes, the default device and the stream that are set here and now."""
    contexts: list[Callable] = [partial(torch.inference_mode, torch.is_inference_mode_enabled()), partial(torch.set_grad_enabled, torch.is_grad_enabled())]
    for kind in AUTOCAST:
        contexts.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)))
    if (device := torch.get_default_device()).type != "cpu":
        contexts.append(partial(torch.device, device))
    if torch.cuda.is_initialized():
        contexts.append(partial(torch.cuda.stream, torch.cuda.current_stream()))

    def inside(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return function(*args, **kwargs)

    return inside


def is_traced() -> bool:
    """Whether tensors are traced or fake here, so that their values cannot be looked at."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of tensors of this dtype are computed in here: the dtype of autocast where it is on."""
    on = device.type in AUTOCAST and torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if on else dtype
