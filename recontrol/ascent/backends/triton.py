"""Backend "triton": Triton kernels for two linear layers, on any GPU that Triton serves."""

from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends.base import KernelBackend
from recontrol.value.prepared import Prepared

GPUS = ("cuda", "xpu")  # ROCm calls itself cuda


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
    hint = "; Triton's interpreter runs there, slowly, where TRITON_INTERPRET=1 was set before triton was imported"

    @property
    def device_types(self) -> tuple[str, ...]:  # type: ignore[override]
        """GPUs, and processors in the interpreter."""
        return (*GPUS, "cpu") if _interpreted() else GPUS

    def _missing(self) -> str | None:
        kernels = _kernels()
        return kernels if isinstance(kernels, str) else None

    def status(self) -> dict[str, Any]:
        """Whether triton is installed and finds a GPU, and whether its interpreter takes the place of one."""
        kernels = _kernels()
        if isinstance(kernels, str):
            return {"available": False, "reason": kernels}
        here = [name for name in self.device_types if getattr(torch, name).is_available()]
        if not here:
            return {"available": False, "reason": "it runs on GPUs, there is none here" + self.hint}
        build = {"triton": kernels.triton.__version__, "interpreted": _interpreted()}
        return {"available": True, "device": ", ".join(here), "depth": "2 linear layers", **build}

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`."""
        arguments.check()
        weights, bias, output = prepared.weights, prepared.wide_biases[0], prepared.output(arguments.head_weights)
        return cast(ModuleType, _kernels()).ascend(arguments.hidden, weights[0], bias, prepared.gram, *output, *arguments[1:6], trace_columns)
