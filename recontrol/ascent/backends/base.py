"""What a backend is, and what those with kernels share."""

from typing import Any

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.value.prepared import Prepared


class Backend:
    """One way to run an ascent. This one runs everything, everywhere; those with kernels refuse what they have none for."""

    name: str  # what the argument `backend` calls it
    capturable = False  # it never waits for the device, so a CUDA graph can hold it

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """Why this backend cannot run this ascent, or None when it can."""
        return None

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """Check the values; return the edited states and the trace of V, (rows, trace_columns)."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """Whether the backend is available, and if not, why; what it can run, and details of its build."""
        return {"available": True, "device": "any", "depth": "any"}


class KernelBackend(Backend):
    """Kernels that compute in float32, for some devices and depths."""

    devices: str  # in words
    device_types: tuple[str, ...]  # what `torch.device.type` may be
    depths: tuple[int, ...] = (2, 3)  # the numbers of linear layers that there are kernels for
    hint = ""  # what else to say where they do not run on the CPU

    def _missing(self) -> str | None:
        """Why this installation has no kernels, or None."""
        raise NotImplementedError

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """As `Backend.why_not`: the installation, the device, the dtype and the depth."""
        device, depth = arguments.hidden.device, len(prepared.weights)
        if (reason := self._missing()) is not None:
            return reason
        if device.type not in self.device_types:
            return f"it runs on {self.devices}, the tensors are on {device}{self.hint if device.type == 'cpu' else ''}"
        if arguments.hidden.dtype == torch.float64:
            return "it computes in float32, the tensors are float64"
        if depth not in self.depths:
            words = " and ".join({2: "two", 3: "three"}[depth] for depth in self.depths)
            return f"it has kernels for {words} linear layers, this value function has {depth}"
        return None
