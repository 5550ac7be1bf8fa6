"""Where an ascent runs: the backends, the choice among them, and the truth about them."""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends import autograd_loop, closed_form, cpu, cuda, dispatch, triton
from recontrol.value.prepared import Prepared

logger = logging.getLogger("recontrol")


class Backend(Protocol):
    """What a backend module offers."""

    def why_not(self, arguments: AscentArguments, prepared: Prepared) -> str | None:
        """Why this backend cannot run this ascent, or None when it can."""

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """Check the values; return the edited states and the trace of V (with 0 columns when none is wanted)."""

    def status(self) -> dict[str, Any]:
        """Whether the backend is available, and if not, why."""


BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "torch": closed_form,
    "cuda": cuda.SPARSE,
    "cuda-dense": cuda.DENSE,
    "triton": triton,
    "reference": autograd_loop,
}
_logged: set[str] = set()


def check_name(name: str) -> None:
    """Refuse an unknown backend.

    Raises:
        ValueError: with the choices.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}; choose one of 'auto', {', '.join(map(repr, BACKENDS))}")


def choose(name: str, arguments: AscentArguments, prepared: Prepared) -> Backend:
    """The backend asked for, or with "auto" the first of `dispatch.order` that can run this ascent.

    Raises:
        RuntimeError: the backend asked for by name cannot run it, with the reason and the choices.
    """
    check_name(name)
    if name != "auto":
        reason = BACKENDS[name].why_not(arguments, prepared)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}; choose one of 'auto', {', '.join(map(repr, BACKENDS))}")
        return BACKENDS[name]
    for candidate in dispatch.order(arguments, prepared):
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
    from recontrol import __version__

    statuses = {name: backend.status() for name, backend in BACKENDS.items()}
    return {
        "versions": {"recontrol": __version__, "torch": torch.__version__},
        "auto": next(name for name, status in statuses.items() if status["available"]),
        "backends": statuses,
    }
