"""Backend "cpu": the C++ extension, two and three linear layers."""

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
    devices = "the CPU"

    def _missing(self) -> str | None:
        return extension.load_error

    def _runs_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def status(self) -> dict[str, Any]:
        """Whether the extension is loaded, and the instruction set it chose on this processor."""
        if (reason := self._missing()) is not None:
            return {"available": False, "reason": reason}
        build = {"instruction_set": extension.module.cpu_capability(), "compiler": extension.module.compiler}
        return {"available": True, "device": "cpu", "depth": "2 or 3 linear layers", **build, "threads": torch.get_num_threads()}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`; the values are checked in C++, and once more in Python to say what is wrong."""
        hidden = extension.with_whole_rows(arguments.hidden)
        if not torch.ops.recontrol_cpu.sound(hidden, *arguments.of_rows, arguments.head_weights):
            arguments.check()
        return extension.launch(torch.ops.recontrol_cpu.ascend, arguments, prepared, trace_columns, float)


if extension.load_error is None:

    @torch.library.register_fake("recontrol_cpu::ascend")
    def _(*_: Any) -> None:
        """Everything is written in place."""

    @torch.library.register_fake("recontrol_cpu::sound")
    def _(*_: Any) -> bool:
        """Invalid values are found when there are values."""
        return True
