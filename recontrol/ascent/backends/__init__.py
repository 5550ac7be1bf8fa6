"""Where an ascent runs: the backends, the choice among them, and what is known of them on this machine."""

import logging
from typing import Any

import torch

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends.base import Backend
from recontrol.ascent.backends.closed_form import OracleBackend, TorchBackend
from recontrol.ascent.backends.compiled import CpuBackend, CudaBackend
from recontrol.ascent.backends.triton import TritonBackend
from recontrol.checks import renamed
from recontrol.value.prepared import Prepared
from recontrol.version import __version__

logger = logging.getLogger("recontrol")

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), TorchBackend(), CudaBackend(), TritonBackend(), OracleBackend())}
# What "auto" tries: by the type of the device what was measured to be the fastest (benchmarks/data/cpu.csv), then "torch", which runs everything.
MEASURED = {"cpu": ("cpu",)}
UNMEASURED = ("torch", "cpu", "cuda", "triton", "oracle")
CHOICES = f"choose one of {', '.join(map(repr, ('auto', *BACKENDS)))}"
_logged: set[str] = set()


def names() -> tuple[str, ...]:
    """What the argument `backend` may be."""
    return ("auto", *BACKENDS)


def order(device: str) -> tuple[str, ...]:
    """The names of the backends that "auto" tries on a device of this type; the first that can run an ascent is taken."""
    return tuple(dict.fromkeys((*MEASURED.get(device, ()), *UNMEASURED)))


def capturable() -> tuple[str, ...]:
    """The backends that a CUDA graph can hold."""
    return tuple(name for name, backend in BACKENDS.items() if backend.capturable)


def check_name(name: str) -> str:
    """The present name of a backend; a ValueError with the choices where there is none of this name."""
    if name == "reference":
        renamed("backend='reference'", "backend='oracle'")
        return "oracle"
    if name not in names():
        raise ValueError(f"unknown backend {name!r}; {CHOICES}")
    return name


def choose(name: str, arguments: AscentArguments, prepared: Prepared) -> Backend:
    """The backend asked for, or a RuntimeError with the reason why it cannot run; with "auto" the first of `order` that can."""
    name = check_name(name)
    for candidate in order(arguments.hidden.device.type) if name == "auto" else (name,):
        reason = BACKENDS[candidate].why_not(arguments, prepared)
        if reason is None:
            return BACKENDS[candidate]
        if name != "auto":
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}; {CHOICES}")
        if reason not in _logged:
            _logged.add(reason)
            logger.info("backend 'auto' passes over %r: %s", candidate, reason)
    raise RuntimeError("no backend can run this ascent")


def backend_info() -> dict[str, Any]:
    """What is built (`versions`), what "auto" uses on this CPU, and for each of `backends` whether it is `available` and the `reason` where not."""
    statuses = {name: backend.status() for name, backend in BACKENDS.items()}
    return {
        "versions": {"recontrol": __version__, "torch": torch.__version__},
        "auto": next(name for name in order("cpu") if statuses[name]["available"]),
        "backends": statuses,
    }
