"""The compiled extension, or why there is none."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.value.prepared import Prepared

module: Any = None
load_error: str | None = None
try:
    module = importlib.import_module("recontrol._C")
except ImportError as error:
    load_error = f"the C++ extension could not be loaded ({error}); install recontrol with a C++ compiler at hand"


def launch(
    operator: Callable[..., None], arguments: AscentArguments, prepared: Prepared, trace_columns: int, as_offset: Callable[[Tensor], Any]
) -> tuple[Tensor, Tensor]:
    """Allocate the results and run one of the extension's operators, which takes the bias of the output as `as_offset` makes it."""
    hidden = with_whole_rows(arguments.hidden)
    weights, biases = prepared.weights, prepared.wide_biases
    second = (weights[1], prepared.second_transposed, biases[1]) if len(weights) == 3 else (None, None, None)
    out, offset = prepared.output(arguments.head_weights)
    edited = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    trace = torch.empty(hidden.shape[0], trace_columns, dtype=torch.float32, device=hidden.device)
    operator(hidden, weights[0], biases[0], prepared.gram, *second, out, as_offset(offset), *arguments[1:6], edited, trace)
    return edited, trace


def with_whole_rows(hidden: Tensor) -> Tensor:
    """The same states, copied where the entries of a row do not lie side by side."""
    return hidden if hidden.shape[1] <= 1 or hidden.stride(1) == 1 else hidden.contiguous()
