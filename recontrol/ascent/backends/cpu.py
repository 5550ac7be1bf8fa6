"""Backend "cpu": the C++ extension, two and three linear layers."""

from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import extension
from recontrol.value.prepared import Prepared


def why_not(arguments: AscentArguments, prepared: Prepared) -> str | None:
    """It needs the extension, tensors on the CPU, no float64, and two or three linear layers."""
    if extension.load_error is not None:
        return extension.load_error
    if arguments.hidden.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {arguments.hidden.device}"
    if arguments.hidden.dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    if len(prepared.weights) not in (2, 3):
        return f"it has kernels for two and three linear layers, this value function has {len(prepared.weights)}"
    return None


def status() -> dict[str, Any]:
    """Whether the extension is loaded, and the instruction set it chose on this processor."""
    if extension.load_error is not None:
        return {"available": False, "reason": extension.load_error}
    return {
        "available": True,
        "device": "cpu",
        "depth": "2 or 3 linear layers",
        "instruction_set": extension.module.cpu_capability(),
        "compiler": extension.module.compiler,
        "threads": torch.get_num_threads(),
    }


def run(arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
    """Check the values, allocate the results and run the kernel."""
    hidden = arguments.hidden
    if hidden.shape[1] > 1 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    ops = torch.ops.recontrol_cpu
    if not ops.sound(hidden, arguments.step_size, arguments.steps, arguments.mask, arguments.radius, arguments.target, arguments.head_weights):
        arguments.check()
    weights, biases = prepared.weights, prepared.wide_biases
    three = len(weights) == 3
    edited = torch.empty(hidden.shape, dtype=hidden.dtype)
    trace = torch.empty(hidden.shape[0], trace_columns)
    ops.ascend(
        hidden,
        weights[0],
        biases[0],
        prepared.gram,
        weights[1] if three else None,
        prepared.second_transposed if three else None,
        biases[1] if three else None,
        arguments.head_weights @ prepared.wide_weights[-1],
        float(arguments.head_weights @ biases[-1]),
        arguments.step_size,
        arguments.steps,
        arguments.mask,
        arguments.radius,
        arguments.target,
        edited,
        trace,
    )
    return edited, trace


if extension.load_error is None:

    @torch.library.register_fake("recontrol_cpu::ascend")
    def _(*_: Any) -> None:
        """Everything is written in place."""

    @torch.library.register_fake("recontrol_cpu::sound")
    def _(*_: Any) -> bool:
        """Nothing is known without the values; what is wrong is found when they are there."""
        return True
