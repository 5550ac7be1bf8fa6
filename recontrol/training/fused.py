"""V of two linear layers for training, which keeps one bit a unit and token for its gradient instead of the activations."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recontrol.value import ValueFunction

KERNELS = ("torch", "triton")


def values_by(kernel: str, value: ValueFunction, hidden: Tensor) -> Tensor:
    """V of packed hidden states, (tokens, hidden_size) -> (tokens, num_heads), by one of `KERNELS`."""
    return fused_values(value, hidden) if kernel == "triton" else value(hidden)


def check_kernel(kernel: str, value: ValueFunction, hidden: Tensor) -> None:
    """Refuse a kernel that cannot evaluate this value function on states like these.

    Raises:
        RuntimeError: with the reason and the choices.
    """
    reason = why_not(value, hidden) if kernel == "triton" else None
    if reason is not None:
        raise RuntimeError(f"kernel {kernel!r} cannot run here: {reason}; choose one of {', '.join(map(repr, KERNELS))}")


def fused_values(value: ValueFunction, hidden: Tensor) -> Tensor:
    """V of packed hidden states by the Triton kernels; its gradient reaches the weights, not the hidden states.

    Args:
        value: two linear layers, float32.
        hidden: (tokens, hidden_size), float32, bfloat16 or float16, taken as a constant.

    Returns:
        (tokens, num_heads), float32.

    Raises:
        RuntimeError: the kernels cannot do this, with the reason.

    Source: the identities of `reference_backward`.
    """
    check_kernel("triton", value, hidden)
    from recontrol.kernels import value_training

    return _apply(value, hidden, value_training.forward, value_training.backward)


def reference_values(value: ValueFunction, hidden: Tensor) -> Tensor:
    """As `fused_values`, in plain PyTorch: what the kernels compute, in the dtype of the weights, on any device.

    Args:
        value: two linear layers.
        hidden: (tokens, hidden_size), floating point, taken as a constant.

    Returns:
        (tokens, num_heads), dtype of the weights.
    """
    return _apply(value, hidden.to(value.dtype), reference_forward, reference_backward)


def why_not(value: ValueFunction, hidden: Tensor) -> str | None:
    """Why the Triton kernels cannot evaluate this value function on these states, or None when they can."""
    weights, _ = value.parameters_by_kind
    if len(weights) != 2:
        return f"it has kernels for two linear layers, this value function has {len(weights)}"
    if value.dtype != torch.float32:
        return f"it needs float32 weights, these are {_name(value.dtype)}"
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it reads float32, bfloat16 and float16 hidden states, these are {_name(hidden.dtype)}"
    if hidden.dim() != 2 or hidden.shape[1] != value.hidden_size:
        return f"it needs hidden states of shape (tokens, {value.hidden_size}), found {tuple(hidden.shape)}"
    if hidden.device != value.device:
        return f"the hidden states are on {hidden.device}, the weights on {value.device}"
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "recontrol[triton]")'
    from recontrol.kernels import value_training

    if hidden.device.type != "cuda" and not value_training.INTERPRETED:
        return f"it needs a CUDA device, the tensors are on {hidden.device} (TRITON_INTERPRET=1, set before triton is imported, runs it slowly anywhere)"
    return None


def reference_forward(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """V = w2 relu(W1 h + b1) + b2, and which units are active, in plain PyTorch.

    Args:
        hidden: (tokens, hidden_size), dtype of the weights.
        w1: (units, hidden_size).
        b1: (units,).
        w2: (heads, units).
        b2: (heads,).

    Returns:
        V, (tokens, heads), and the mask m = 1[W1 h + b1 > 0], (tokens, units), bool. NaN counts as active, as in autograd's ReLU.
    """
    z = torch.addmm(b1, hidden, w1.T)
    return torch.addmm(b2, torch.relu(z), w2.T), ~(z <= 0)


def reference_backward(gradient: Tensor, mask: Tensor, hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the weights, from the mask instead of the activations.

        P_k = (m * dv_k)^T H,    n_k = sum over tokens of m * dv_k,    for each head k
        dW1 = sum_k diag(w2_k) P_k,    db1 = sum_k w2_k * n_k,    dw2_kj = W1_j . P_kj + b1_j n_kj,    db2 = sum over tokens of dv

    since dV_k / dz = w2_k * m and an active unit is m * (W1 h + b1).

    Args:
        gradient: (tokens, heads), dv, the gradient with respect to V.
        mask: (tokens, units), bool, as `reference_forward` returned it.
        hidden: (tokens, hidden_size), dtype of the weights.
        w1: (units, hidden_size).
        b1: (units,).
        w2: (heads, units).

    Returns:
        The gradients of w1, b1, w2 and b2, each of its weight's shape.
    """
    masked = torch.where(mask[:, :, None], gradient[:, None, :], 0)  # (tokens, units, heads)
    products = torch.einsum("tjk,th->kjh", masked, hidden)  # (heads, units, hidden_size)
    active = masked.sum(0).T  # (heads, units)
    w1_gradient = torch.einsum("kj,kjh->jh", w2, products)
    w2_gradient = torch.einsum("jh,kjh->kj", w1, products) + b1 * active
    return w1_gradient, (w2 * active).sum(0), w2_gradient, gradient.sum(0)


class _Values(torch.autograd.Function):
    """A forward and a backward with the signatures of `reference_forward` and `reference_backward` as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, forward: Callable, backward: Callable) -> Tensor:
        values, mask = forward(hidden, w1, b1, w2, b2)
        ctx.save_for_backward(mask, hidden, w1, b1, w2)
        ctx.backward_of = backward
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.backward_of(gradient, *ctx.saved_tensors), None, None


def _apply(value: ValueFunction, hidden: Tensor, forward: Callable, backward: Callable) -> Tensor:
    (w1, w2), (b1, b2) = value.parameters_by_kind
    return _Values.apply(hidden, w1, b1, w2, b2, forward, backward)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
