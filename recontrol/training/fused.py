"""V in training: by autograd, in low precision, or for two linear layers with a mask of active units kept instead of the activations."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from recontrol.checks import dtype_name
from recontrol.training.config import KERNELS
from recontrol.value import ValueFunction

# In one product: enough to be quick, few enough that their activations are read from the cache.
TOKENS_IN_BLOCK = 1024
# Weights of the first layer below which starting so many small operations takes longer than autograd does.
SMALLEST_CLOSED_FORM = 2**16


def evaluation(value: ValueFunction, kernel: str, compute_dtype: str | None) -> Callable[[Tensor], Tensor]:
    """V of packed hidden states on any device, with a gradient for its weights, by one of `KERNELS` or in a low precision."""
    if compute_dtype is not None:
        return lambda states: low_precision_values(value, states.to(value.device), getattr(torch, compute_dtype))
    if kernel == "torch":
        return lambda states: value(states.to(value.device))
    return lambda states: fused_values(value, states.to(value.device), kernel)


def low_precision_values(value: ValueFunction, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """V with the products of its hidden layers in `dtype`; weights and gradients stay as they are."""
    weights, biases = value.parameters_by_kind
    activations = hidden.to(dtype)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        activations = torch.relu(linear(activations, weight.to(dtype), bias.to(dtype)))
    # In the dtype of the weights: a TD error is the difference of two values close together.
    return linear(activations.to(value.dtype), weights[-1], biases[-1])


def chosen_kernel(kernel: str, value: ValueFunction, hidden: Tensor) -> str:
    """One of `KERNELS`: what "auto" is, or the one asked for, or RuntimeError with the reason why it cannot run on states like these."""
    if kernel == "auto":
        pays = hidden.device.type == "cpu" and value.parameters_by_kind[0][0].numel() >= SMALLEST_CLOSED_FORM
        return "closed-form" if pays and why_not(value, hidden, "closed-form") is None else "torch"
    if kernel != "torch" and (reason := why_not(value, hidden, kernel)) is not None:
        raise RuntimeError(f"kernel {kernel!r} cannot run here: {reason}; choose one of {', '.join(map(repr, ('auto', *KERNELS)))}")
    return kernel


def fused_values(value: ValueFunction, hidden: Tensor, kernel: str = "triton") -> Tensor:
    """V for two linear layers, by the Triton kernels or block by block, with a mask kept for the gradient, which reaches the weights, not the states."""
    chosen_kernel(kernel, value, hidden)
    forward, backward = blockwise_forward, blockwise_backward
    if kernel == "triton":
        from recontrol.kernels import value_training

        forward, backward = value_training.forward, value_training.backward
    (w1, w2), (b1, b2) = value.parameters_by_kind
    return _Values.apply(hidden, w1, b1, w2, b2, forward, backward)


def why_not(value: ValueFunction, hidden: Tensor, kernel: str = "triton") -> str | None:
    """Why the Triton kernels, or the closed form, cannot evaluate this value function on these states, or None when they can."""
    layers, closed = len(value.hidden_dims) + 1, kernel == "closed-form"
    if layers != 2:
        return f"{'the closed form is' if closed else 'it has kernels'} for two linear layers, this value function has {layers}"
    if closed:
        # With more heads it needs a product for each.
        return None if value.num_heads == 1 else f"the closed form is for one head, this value function has {value.num_heads}"
    readable, wanted = (torch.float32, torch.bfloat16, torch.float16), value.hidden_size
    for fits, reason in (
        (value.dtype == torch.float32, f"it needs float32 weights, these are {dtype_name(value.dtype)}"),
        (hidden.dtype in readable, f"it reads float32, bfloat16 and float16 hidden states, these are {dtype_name(hidden.dtype)}"),
        (hidden.dim() == 2 and hidden.shape[1] == wanted, f"it needs hidden states of shape (tokens, {wanted}), found {tuple(hidden.shape)}"),
        (hidden.device == value.device, f"the hidden states are on {hidden.device}, the weights on {value.device}"),
        (importlib.util.find_spec("triton") is not None, 'triton is not installed (pip install "recontrol[triton]")'),
    ):
        if not fits:
            return reason
    from recontrol.kernels import value_training

    if hidden.device.type != "cuda" and not value_training.INTERPRETED:
        return f"it needs a CUDA device, the tensors are on {hidden.device} (TRITON_INTERPRET=1, set before triton is imported, runs it slowly anywhere)"
    return None


def blockwise_forward(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """V = w2 relu(W1 h + b1) + b2, (tokens, heads), and the mask m = 1[W1 h + b1 > 0], (tokens, units), bool, in which NaN is active as in ReLU."""
    values, mask = hidden.new_empty(len(hidden), len(w2), dtype=w1.dtype), hidden.new_empty(len(hidden), len(w1), dtype=torch.bool)
    z = hidden.new_empty(min(TOKENS_IN_BLOCK, len(hidden)), len(w1), dtype=w1.dtype)
    for rows, out, active in zip(*(tensor.split(TOKENS_IN_BLOCK) for tensor in (hidden, values, mask)), strict=True):
        block = torch.addmm(b1, rows.to(w1.dtype), w1.T, out=z[: len(rows)])
        torch.le(block, 0, out=active).logical_not_()
        torch.addmm(b2, block.relu_(), w2.T, out=out)
    return values, mask


def blockwise_backward(gradient: Tensor, mask: Tensor, hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1, b1, w2 and b2 for one head, from the mask and the gradient with respect to V, (tokens, 1).

    P = (m * dv)^T H,  n = sum over tokens of m * dv,  dW1 = diag(w2) P,  db1 = w2 * n,  dw2_j = W1_j . P_j + b1_j n_j,  db2 = sum of dv
    """
    products, active = torch.zeros_like(w1), torch.zeros_like(b1)
    buffer = hidden.new_empty(min(TOKENS_IN_BLOCK, len(hidden)), len(w1), dtype=w1.dtype)
    for rows, part, of_unit in zip(*(tensor.split(TOKENS_IN_BLOCK) for tensor in (hidden, gradient, mask)), strict=True):
        masked = torch.mul(of_unit, part, out=buffer[: len(rows)])
        products.addmm_(masked.T, rows.to(w1.dtype))
        active += masked.sum(0)
    w2_gradient = torch.linalg.vecdot(w1, products) + b1 * active
    return products.mul_(w2.T), w2[0] * active, w2_gradient[None], gradient.sum(0)


class _Values(torch.autograd.Function):
    """A forward and a backward with the signatures of `blockwise_forward` and `blockwise_backward` as one operation of autograd."""

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
