"""Backend "reference": the oracle behind the interface of the others."""

from typing import Any

from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.value.prepared import Prepared


def why_not(arguments: AscentArguments, prepared: Prepared) -> str | None:
    """It can run everything."""
    return None


def status() -> dict[str, Any]:
    """Always there."""
    return {"available": True, "device": "any", "depth": "any"}


def run(arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
    """Check the values and run the autograd loop of `recontrol.oracle`."""
    from recontrol.ascent.oracle import ascend_loop

    arguments.check()
    edited, trace = ascend_loop(arguments, prepared.weights, prepared.biases, prepared.compute_dtype)
    return edited, trace if trace_columns else trace.new_empty(trace.shape[0], 0, dtype=prepared.compute_dtype)
