"""Where an ascent runs: the backends, the choice among them, and what is known of them on this machine."""

import logging
from typing import Any

import torch

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import dispatch
from recontrol.ascent.backends.base import Backend
from recontrol.ascent.backends.closed_form import TorchBackend
from recontrol.ascent.backends.cpu import CpuBackend
from recontrol.ascent.backends.cuda import CudaBackend
from recontrol.ascent.backends.oracle import OracleBackend
from recontrol.ascent.backends.triton import TritonBackend
from recontrol.checks import renamed
from recontrol.value.prepared import Prepared
from recontrol.version import __version__

logger = logging.getLogger("recontrol")

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), TorchBackend(), CudaBackend(), TritonBackend(), OracleBackend())}
_logged: set[str] = set()


def names() -> tuple[str, ...]:
    """What the argument `backend` may be."""
    return ("auto", *BACKENDS)


def capturable() -> tuple[str, ...]:
    """The backends that a CUDA graph can hold."""
    return tuple(name for name, backend in BACKENDS.items() if backend.capturable)


def check_name(name: str) -> str:
    """The present name of a backend; a ValueError with the choices where there is none of this name."""
    if name == "reference":
        renamed("backend='reference'", "backend='oracle'")
        return "oracle"
    if name not in names():
        raise ValueError(f"unknown backend {name!r}; {_choices()}")
    return name


def choose(name: str, arguments: AscentArguments, prepared: Prepared) -> Backend:
    """The backend asked for, or with "auto" the first of `dispatch.order` that can run this ascent.

    Raises:
        RuntimeError: the backend asked for by name cannot run it, with the reason and the choices.
    """
    name = check_name(name)
    if name != "auto":
        reason = BACKENDS[name].why_not(arguments, prepared)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}; {_choices()}")
        return BACKENDS[name]
    for candidate in dispatch.order(arguments.hidden.device.type):
        reason = BACKENDS[candidate].why_not(arguments, prepared)
        if reason is None:
            return BACKENDS[candidate]
        if reason not in _logged:
            _logged.add(reason)
            logger.info("backend 'auto' passes over %r: %s", candidate, reason)
    raise RuntimeError("no backend can run this ascent")


def backend_info() -> dict[str, Any]:
    """What is built, what "auto" uses on this machine, and why not the others.

    Returns:
        a dictionary with `versions`, `auto` (the backend used for float32 input, two linear layers, on the CPU),
        and for each backend `available`, `reason` when it is not, and details of its build.
    """
    statuses = {name: backend.status() for name, backend in BACKENDS.items()}
    return {
        "versions": {"recontrol": __version__, "torch": torch.__version__},
        "auto": next(name for name in dispatch.order("cpu") if statuses[name]["available"]),
        "backends": statuses,
    }


def _choices() -> str:
    return f"choose one of {', '.join(map(repr, names()))}"
