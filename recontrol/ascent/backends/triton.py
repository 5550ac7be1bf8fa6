"""Backend "triton": Triton kernels for two linear layers, on any GPU that Triton serves."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.value.prepared import Prepared

GPUS = ("cuda", "xpu")  # ROCm calls itself cuda


@cache
def _kernels() -> tuple[ModuleType | None, str]:
    """The kernels, imported when first asked for, or why there are none."""
    try:
        import recontrol.kernels.ascend as kernels
    except ImportError as error:
        return None, f"triton could not be imported ({error}); pip install 'recontrol[triton]'"
    return kernels, ""


def why_not(arguments: AscentArguments, prepared: Prepared) -> str | None:
    """It needs triton, tensors on a GPU, no float64, and two linear layers."""
    kernels, reason = _kernels()
    if kernels is None:
        return reason
    device = arguments.hidden.device
    if device.type not in GPUS and not (device.type == "cpu" and kernels.interpreted()):
        return f"it runs on GPUs, the tensors are on {device}" + (_HOW_TO_INTERPRET if device.type == "cpu" else "")
    if arguments.hidden.dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    if len(prepared.weights) != 2:
        return f"it has kernels for two linear layers, this value function has {len(prepared.weights)}"
    return None


_HOW_TO_INTERPRET = "; Triton's interpreter runs there, slowly, where TRITON_INTERPRET=1 was set before triton was imported"


def status() -> dict[str, Any]:
    """Whether triton is installed and finds a GPU, and whether its interpreter stands in for one."""
    kernels, reason = _kernels()
    if kernels is None:
        return {"available": False, "reason": reason}
    interpreted = kernels.interpreted()
    here = [name for name in GPUS if getattr(torch, name).is_available()]
    if not here and not interpreted:
        return {"available": False, "reason": "it runs on GPUs, there is none here" + _HOW_TO_INTERPRET}
    return {
        "available": True,
        "device": ", ".join([*here, *(["cpu"] if interpreted else [])]),
        "depth": "2 linear layers",
        "triton": kernels.triton.__version__,
        "interpreted": interpreted,
    }


def run(arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
    """Check the values, fold the heads and run the kernels."""
    kernels, reason = _kernels()
    if kernels is None:
        raise RuntimeError(reason)
    arguments.check()
    return kernels.ascend(
        arguments.hidden,
        prepared.weights[0],
        prepared.wide_biases[0],
        prepared.gram,
        arguments.head_weights @ prepared.wide_weights[-1],
        arguments.head_weights @ prepared.wide_biases[-1],
        arguments.step_size,
        arguments.steps,
        arguments.mask,
        arguments.radius,
        arguments.target,
        trace_columns,
    )
