"""The backends of the extension, for two and three linear layers: "cpu" in C++, "cuda" in CUDA."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import extension
from recontrol.ascent.backends.base import KernelBackend
from recontrol.value.prepared import Prepared


class CpuBackend(KernelBackend):
    """The C++ kernels, for the best instruction set that the processor has."""

    name = "cpu"
    devices, device_types = "the CPU", ("cpu",)

    def _missing(self) -> str | None:
        return extension.load_error

    def status(self) -> dict[str, Any]:
        """Whether the extension is loaded, and the instruction set it chose on this processor."""
        if (reason := self._missing()) is not None:
            return {"available": False, "reason": reason}
        build = {"instruction_set": extension.module.cpu_capability(), "compiler": extension.module.compiler}
        return {"available": True, "device": "cpu", "depth": "2 or 3 linear layers", **build, "threads": torch.get_num_threads()}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`; the values are checked in C++, and once more in Python to say what is wrong."""
        if not torch.ops.recontrol_cpu.sound(extension.with_whole_rows(arguments.hidden), *arguments[1:]):
            arguments.check()
        return extension.launch(torch.ops.recontrol_cpu.ascend, arguments, prepared, trace_columns, float)


class CudaBackend(KernelBackend):
    """The CUDA kernels: one launch takes all steps."""

    name = "cuda"
    capturable = True
    devices, device_types = "GPUs of NVIDIA", ("cuda",)

    def _missing(self) -> str | None:
        return _no_cuda()

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """As `Backend.why_not`, and what the kernels need of the device."""
        units = [weight.shape[0] for weight in prepared.weights[:-1]]
        return super().why_not(arguments, prepared) or _device_why_not(arguments.hidden.device.index, units[0], units[1] if len(units) == 2 else 0)

    def status(self) -> dict[str, Any]:
        """Whether the extension was built with CUDA and finds a GPU."""
        reason = self._missing() or (None if torch.cuda.is_available() else f"it runs on {self.devices}, there is none here")
        if reason is not None:
            return {"available": False, "reason": reason}
        return {"available": True, "device": "cuda", "depth": "2 or 3 linear layers", "cuda": extension.module.cuda}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`; the kernels are queued on the current stream."""
        arguments.check()
        return extension.launch(_launch, arguments, prepared, trace_columns, lambda offset: offset)


def _launch(*arguments: Any) -> None:
    torch.ops.recontrol_cuda.ascend(*arguments)


def _no_cuda() -> str | None:
    if extension.load_error is not None:
        return extension.load_error
    return None if extension.module.cuda else "the extension was built without CUDA; install recontrol where nvcc and a CUDA build of torch are at hand"


@cache
def _device_why_not(device: int, units: int, second_units: int) -> str | None:
    return extension.module.cuda_why_not(device, units, second_units)


# Everything is written in place, and invalid values are found when there are values.
if extension.load_error is None:
    torch.library.register_fake("recontrol_cpu::ascend", lambda *_: None)
    torch.library.register_fake("recontrol_cpu::sound", lambda *_: True)
if _no_cuda() is None:
    torch.library.register_fake("recontrol_cuda::ascend", lambda *_: None)
