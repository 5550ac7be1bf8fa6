"""Backend "triton": Triton kernels for two linear layers, on any GPU that Triton serves."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends.base import KernelBackend
from recontrol.value.prepared import Prepared

GPUS = ("cuda", "xpu")  # ROCm calls itself cuda
_HOW_TO_INTERPRET = "; Triton's interpreter runs there, slowly, where TRITON_INTERPRET=1 was set before triton was imported"


@cache
def _kernels() -> ModuleType | str:
    """The kernels, imported when first asked for, or why there are none."""
    try:
        import recontrol.kernels.ascend as kernels
    except ImportError as error:
        return f"triton could not be imported ({error}); pip install 'recontrol[triton]'"
    return kernels


def _interpreted() -> bool:
    kernels = _kernels()
    return not isinstance(kernels, str) and kernels.interpreted()


class TritonBackend(KernelBackend):
    """The Triton kernels, on the CPU in Triton's interpreter."""

    name = "triton"
    capturable = True
    devices = "GPUs"
    depths = (2,)

    def _missing(self) -> str | None:
        kernels = _kernels()
        return kernels if isinstance(kernels, str) else None

    def _runs_on(self, device: torch.device) -> bool:
        return device.type in GPUS or (device.type == "cpu" and _interpreted())

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """As `Backend.why_not`; on the CPU it also says how to get the interpreter."""
        reason, device = super().why_not(arguments, prepared), arguments.hidden.device
        if reason is not None and self._missing() is None and device.type == "cpu" and not _interpreted():
            return reason + _HOW_TO_INTERPRET
        return reason

    def status(self) -> dict[str, Any]:
        """Whether triton is installed and finds a GPU, and whether its interpreter takes the place of one."""
        kernels = _kernels()
        if isinstance(kernels, str):
            return {"available": False, "reason": kernels}
        here = [name for name in GPUS if getattr(torch, name).is_available()] + (["cpu"] if _interpreted() else [])
        if not here:
            return {"available": False, "reason": "it runs on GPUs, there is none here" + _HOW_TO_INTERPRET}
        build = {"triton": kernels.triton.__version__, "interpreted": _interpreted()}
        return {"available": True, "device": ", ".join(here), "depth": "2 linear layers", **build}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`."""
        kernels = _kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        arguments.check()
        return kernels.ascend(
            arguments.hidden,
            prepared.weights[0],
            prepared.wide_biases[0],
            prepared.gram,
            *prepared.output(arguments.head_weights),
            *arguments.of_rows,
            trace_columns,
        )
