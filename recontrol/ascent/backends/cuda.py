"""Backends "cuda" and "cuda-dense": the CUDA kernels of the extension, two and three linear layers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import extension
from recontrol.value.prepared import Prepared


@dataclass
class CudaBackend:
    """The CUDA kernels, in one of two ways to take the steps of two linear layers.

    Args:
        dense: multiply the whole slope with W_1 W_1^T at every step, for all rows together, rather than follow the units that
            flip, row by row. It reads less where very many units flip. Three linear layers have one way.
    """

    dense: bool

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """It needs an extension built with CUDA, tensors on a GPU of NVIDIA, no float64, and two or three linear layers."""
        reason = _missing()
        if reason is not None:
            return reason
        device = arguments.hidden.device
        if device.type != "cuda":
            return f"it runs on GPUs of NVIDIA, the tensors are on {device}"
        if arguments.hidden.dtype == torch.float64:
            return "it computes in float32, the tensors are float64"
        depth = len(prepared.weights)
        if depth not in (2, 3) or (self.dense and depth == 3):
            return f"it has kernels for two {'linear layers' if self.dense else 'and three linear layers'}, this value function has {depth}"
        return _device_why_not(device.index, prepared.weights[0].shape[0], prepared.weights[1].shape[0] if depth == 3 else 0, self.dense)

    def status(self) -> dict[str, Any]:
        """Whether the extension was built with CUDA and finds a GPU."""
        reason = _missing()
        if reason is None and not torch.cuda.is_available():
            reason = "it runs on GPUs of NVIDIA, there is none here"
        if reason is not None:
            return {"available": False, "reason": reason}
        return {"available": True, "device": "cuda", "depth": "2 linear layers" if self.dense else "2 or 3 linear layers", "cuda": extension.module.cuda}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """Check the values, allocate the results and queue the kernels."""
        arguments.check()
        hidden = arguments.hidden
        if hidden.shape[1] > 1 and hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        weights, biases = prepared.weights, prepared.wide_biases
        three = len(weights) == 3
        edited = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        trace = torch.empty(hidden.shape[0], trace_columns, device=hidden.device)
        _launch(
            hidden,
            weights[0],
            biases[0],
            prepared.gram,
            weights[1] if three else None,
            prepared.second_transposed if three else None,
            biases[1] if three else None,
            arguments.head_weights @ prepared.wide_weights[-1],
            arguments.head_weights @ biases[-1],
            arguments.step_size,
            arguments.steps,
            arguments.mask,
            arguments.radius,
            arguments.target,
            self.dense,
            edited,
            trace,
        )
        return edited, trace


SPARSE, DENSE = CudaBackend(dense=False), CudaBackend(dense=True)


def _launch(*arguments: Any) -> None:
    torch.ops.recontrol_cuda.ascend(*arguments)


def _missing() -> str | None:
    """Why there are no CUDA kernels in this installation, or None."""
    if extension.load_error is not None:
        return extension.load_error
    if extension.module.cuda is None:
        return "the extension was built without CUDA; install recontrol where nvcc and a CUDA build of torch are at hand"
    return None


@cache
def _device_why_not(device: int, units: int, second_units: int, dense: bool) -> str | None:
    return extension.module.cuda_why_not(device, units, second_units, dense)


if _missing() is None:

    @torch.library.register_fake("recontrol_cuda::ascend")
    def _(*_: Any) -> None:
        """Everything is written in place."""
