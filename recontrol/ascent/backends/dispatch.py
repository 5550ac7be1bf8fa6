"""In which order "auto" tries the backends: what was measured to be quickest first, then what can run everything."""

from dataclasses import dataclass

import torch

from recontrol.ascent.arguments import AscentArguments
from recontrol.value.prepared import Prepared


@dataclass(frozen=True)
class Measured:
    """A backend that was measured to be the quickest.

    Args:
        device: type of the device.
        dtypes: of the weights.
        layers: numbers of linear layers.
        rows: up to how many hidden states.
        backend: its name.
        source: where the rows of the measurement are.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    layers: tuple[int, ...]
    rows: float
    backend: str
    source: str


# No GPU has been measured yet, so there "auto" takes the closed form in PyTorch.
MEASURED = (Measured("cpu", (torch.float32,), (2, 3), float("inf"), "cpu", "benchmarks/data/cpu.csv"),)
# "torch" can run everything; what comes behind it is reached only where it is missing or asked for by name.
UNMEASURED = ("torch", "cuda", "cuda-dense", "triton", "reference")


def order(arguments: AscentArguments, prepared: Prepared) -> list[str]:
    """The names of the backends to try for this ascent; the first that can run it is taken."""
    device, rows, layers, dtype = arguments.hidden.device.type, arguments.hidden.shape[0], len(prepared.weights), prepared.weights[0].dtype
    quickest = [found.backend for found in MEASURED if found.device == device and dtype in found.dtypes and layers in found.layers and rows <= found.rows]
    # For other dtypes it reads half the bytes. Also where it has no kernels: then its reason is logged.
    compiled = ["cpu"] if device == "cpu" else []
    return list(dict.fromkeys([*quickest, *compiled, *UNMEASURED]))
