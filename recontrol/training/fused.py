"""V of two linear layers for training, which keeps a mask of active units for its gradient instead of the activations."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recontrol.value import ValueFunction

KERNELS = ("torch", "closed-form", "triton")
# In one product: enough to be quick, few enough that their activations are read from the cache.
TOKENS_IN_BLOCK = 1024
# Weights of the first layer below which starting so many small operations takes longer than autograd does.
SMALLEST_CLOSED_FORM = 2**16


def values_by(kernel: str, value: ValueFunction, hidden: Tensor) -> Tensor:
    """V of packed hidden states, (tokens, hidden_size) -> (tokens, num_heads), by one of `KERNELS`."""
    if kernel == "triton":
        return fused_values(value, hidden)
    return closed_form_values(value, hidden) if kernel == "closed-form" else value(hidden)


def chosen_kernel(kernel: str, value: ValueFunction, hidden: Tensor) -> str:
    """One of `KERNELS`: the one asked for, or for "auto" the one that is known to be the fastest.

    On a CPU that is the closed form, where it can be and the first layer is no tiny one; else autograd.

    Raises:
        RuntimeError: the one asked for cannot evaluate this value function on states like these; with the reason and the choices.
    """
    if kernel == "auto":
        large = value.parameters_by_kind[0][0].numel() >= SMALLEST_CLOSED_FORM
        return "closed-form" if hidden.device.type == "cpu" and large and _why_no_closed_form(value) is None else "torch"
    reason = why_not(value, hidden) if kernel == "triton" else _why_no_closed_form(value) if kernel == "closed-form" else None
    if reason is not None:
        raise RuntimeError(f"kernel {kernel!r} cannot run here: {reason}; choose one of {', '.join(map(repr, ('auto', *KERNELS)))}")
    return kernel


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
    chosen_kernel("triton", value, hidden)
    from recontrol.kernels import value_training

    return _apply(value, hidden, value_training.forward, value_training.backward)


def closed_form_values(value: ValueFunction, hidden: Tensor) -> Tensor:
    """As `fused_values`, in plain PyTorch, a block of tokens at a time; what is kept for the gradient is a byte a unit and token.

    Beside autograd on a CPU, for one head: somewhat less time, and a fraction of the memory, since no activations of more than a block exist.

    Args:
        value: two linear layers and one head.
        hidden: (tokens, hidden_size), floating point, taken as a constant.

    Returns:
        (tokens, 1), dtype of the weights.

    Raises:
        RuntimeError: the value function is another.
    """
    chosen_kernel("closed-form", value, hidden)
    return _apply(value, hidden, blockwise_forward, blockwise_backward)


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


def blockwise_forward(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference_forward`, for hidden states of any floating-point dtype."""
    values, mask = hidden.new_empty(len(hidden), len(w2), dtype=w1.dtype), hidden.new_empty(len(hidden), len(w1), dtype=torch.bool)
    z = hidden.new_empty(min(TOKENS_IN_BLOCK, len(hidden)), len(w1), dtype=w1.dtype)
    for rows, out, active in zip(*(tensor.split(TOKENS_IN_BLOCK) for tensor in (hidden, values, mask)), strict=True):
        block = torch.addmm(b1, rows.to(w1.dtype), w1.T, out=z[: len(rows)])
        torch.le(block, 0, out=active).logical_not_()
        torch.addmm(b2, block.relu_(), w2.T, out=out)
    return values, mask


def blockwise_backward(gradient: Tensor, mask: Tensor, hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference_backward`, for one head and hidden states of any floating-point dtype."""
    products, active = torch.zeros_like(w1), torch.zeros_like(b1)
    buffer = hidden.new_empty(min(TOKENS_IN_BLOCK, len(hidden)), len(w1), dtype=w1.dtype)
    for rows, part, of_unit in zip(*(tensor.split(TOKENS_IN_BLOCK) for tensor in (hidden, gradient, mask)), strict=True):
        masked = torch.mul(of_unit, part, out=buffer[: len(rows)])
        products.addmm_(masked.T, rows.to(w1.dtype))
        active += masked.sum(0)
    w2_gradient = torch.linalg.vecdot(w1, products) + b1 * active
    return products.mul_(w2.T), w2[0] * active, w2_gradient[None], gradient.sum(0)


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


def _why_no_closed_form(value: ValueFunction) -> str | None:
    if len(value.hidden_dims) != 1:
        return f"the closed form is for two linear layers, this value function has {len(value.hidden_dims) + 1}"
    # With more it needs a product for each.
    return None if value.num_heads == 1 else f"the closed form is for one head, this value function has {value.num_heads}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
