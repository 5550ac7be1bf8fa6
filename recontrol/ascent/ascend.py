"""Gradient ascent on a value function: the one operation that every decode step under control runs."""

from typing import Any

import torch
from torch import Tensor

from recontrol.ambient import is_traced, shielded
from recontrol.ascent import backends
from recontrol.ascent.arguments import AscentArguments, normalise
from recontrol.value import ValueFunction
from recontrol.value.prepared import Prepared, cache_of


def ascend(
    hidden: Tensor,
    value: ValueFunction,
    step_size: float | Tensor = 0.5,
    steps: int | Tensor = 30,
    *,
    mask: Tensor | None = None,
    radius: float | Tensor | None = None,
    target: float | Tensor | None = None,
    head_weights: Tensor | None = None,
    return_trace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Climb V from each hidden state by plain gradient steps, u <- u + alpha * grad V(h + u), starting at u = 0.

    `hidden` is the state at the position whose logits sample the next token; the result takes its place as the input of the output embedding. A row's
    result does not depend, to the bit, on the other rows or on how many there are. No gradient flows through.

    Args:
        hidden: (rows, hidden_size), float32, bfloat16, float16 or float64; half precision accumulates in float32; rows may be strided.
        value: the value function, on the device of `hidden`; its weights may be of another dtype, except that float64 goes with float64 only.
        step_size: alpha >= 0, a float or (rows,).
        steps: n >= 0, an int or (rows,); a row with 0 steps comes back bit-identical.
        mask: (rows,), bool, True where the row is live; other rows come back bit-identical and cost nothing.
        radius: trust region: the path is cut where |u| reaches it. A float or (rows,), in units of the hidden state.
        target: climb -(V - target)^2 instead of V, that is, scale each step by 2 (target - V). A float or (rows,).
        head_weights: (num_heads,), the objective is the weighted sum of the heads; required if there are several.
        return_trace: also return V(h + u) after 0, 1, ... steps; a row that ends early keeps its last value.
        backend: "auto", "cpu" (C++), "torch" (closed form), "cuda" (CUDA kernels), "triton" (two linear layers on a GPU), or "oracle" (autograd loop). A
            backend asked for by name runs or raises; "auto" takes the one that was measured to be the quickest.

    Returns:
        (rows, hidden_size), dtype of `hidden`; with `return_trace` also (rows, max steps + 1), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices or numbers; hidden states that are NaN or infinite are named by row.
        RuntimeError: the backend asked for cannot run here, with the reason.

    Source: Kong et al. 2024, section 4.3 (test-time intervention).
    """
    arguments = normalise(hidden, value, step_size, steps, mask, radius, target, head_weights)
    backend = backends.check_name(backend)
    columns = 0
    if return_trace:
        columns = 1 + (steps if isinstance(steps, int) and hidden.shape[0] else arguments.most_steps())
    with torch.no_grad():
        # A traced or fake tensor has no values to look at: it goes through the operator, which is opaque.
        if is_traced() or hidden.is_meta:
            states, *rest = arguments
            edited, trace = torch.ops.recontrol.ascend(states, *value.parameters_by_kind, *rest, value._cache.key, backend, columns)
        else:
            edited, trace = _run(arguments, value.prepared(), backend, columns)
    return (edited, trace) if return_trace else edited


def _run(arguments: AscentArguments, prepared: Prepared, backend: str, trace_columns: int) -> tuple[Tensor, Tensor]:
    """Pick the backend, which checks the values, and run it."""
    # Kernels take float32 where autocast would make half-precision products.
    with shielded():
        edited, trace = backends.choose(backend, arguments, prepared).run(arguments, prepared, trace_columns)
    # What the fake below promises, even for states that lie transposed.
    return edited.contiguous(), trace


def _ascend(hidden: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, cache_key, backend, trace_columns = rest
    # The kernels want numbers side by side.
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return _run(AscentArguments(hidden, *tensors), cache_of(cache_key).get(weights, biases), backend, trace_columns)


_TENSORS = "Tensor hidden, Tensor[] weights, Tensor[] biases, Tensor step_size, Tensor steps, Tensor? mask, Tensor? radius, Tensor? target, Tensor head_weights"
_SCHEMA = f"({_TENSORS}, SymInt cache_key, str backend, SymInt trace_columns) -> (Tensor, Tensor)"
_operator = torch.library.custom_op("recontrol::ascend", _ascend, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _(hidden: Tensor, weights: list[Tensor], biases: list[Tensor], step_size: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), step_size.new_empty(hidden.shape[0], rest[-1])
