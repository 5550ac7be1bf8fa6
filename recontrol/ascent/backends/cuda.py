"""Backend "cuda": the CUDA kernels of the extension, two and three linear layers."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import extension
from recontrol.ascent.backends.base import KernelBackend
from recontrol.value.prepared import Prepared


class CudaBackend(KernelBackend):
    """The CUDA kernels: one launch takes all steps."""

    name = "cuda"
    capturable = True
    devices = "GPUs of NVIDIA"

    def _missing(self) -> str | None:
        return _missing()

    def _runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """As `Backend.why_not`, and what the kernels need of the device."""
        units = [weight.shape[0] for weight in prepared.weights[:-1]]
        return super().why_not(arguments, prepared) or _device_why_not(arguments.hidden.device.index, units[0], units[1] if len(units) == 2 else 0)

    def status(self) -> dict[str, Any]:
        """Whether the extension was built with CUDA and finds a GPU."""
        reason = _missing()
        if reason is None and not torch.cuda.is_available():
            reason = "it runs on GPUs of NVIDIA, there is none here"
        if reason is not None:
            return {"available": False, "reason": reason}
        return {"available": True, "device": "cuda", "depth": "2 or 3 linear layers", "cuda": extension.module.cuda}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`; the kernels are queued on the current stream."""
        arguments.check()
        return extension.launch(_launch, arguments, prepared, trace_columns, lambda offset: offset)


def _launch(*arguments: Any) -> None:
    torch.ops.recontrol_cuda.ascend(*arguments)


def _missing() -> str | None:
    if extension.load_error is not None:
        return extension.load_error
    if extension.module.cuda is None:
        return "the extension was built without CUDA; install recontrol where nvcc and a CUDA build of torch are at hand"
    return None


@cache
def _device_why_not(device: int, units: int, second_units: int) -> str | None:
    return extension.module.cuda_why_not(device, units, second_units)


if _missing() is None:

    @torch.library.register_fake("recontrol_cuda::ascend")
    def _(*_: Any) -> None:
        """Everything is written in place."""
