"""Backend "oracle": the autograd loop of `recontrol.oracle` behind the interface of the others."""

from torch import Tensor

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends.base import Backend
from recontrol.ascent.oracle import ascend_loop
from recontrol.value.prepared import Prepared


class OracleBackend(Backend):
    """Any depth, any device."""

    name = "oracle"

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`."""
        arguments.check()
        edited, trace = ascend_loop(arguments, prepared.weights, prepared.biases, prepared.compute_dtype)
        return edited, trace if trace_columns else trace.new_empty(trace.shape[0], 0)
