"""The backends in plain PyTorch, any depth, any device: "torch", the closed form without autograd, and "oracle".

In the closed form everything happens in the pre-activations of the first layer. With z = W_1 h + b_1 and c = dV/dz, a step moves
h by alpha W_1^T c and therefore z by alpha G c, G = W_1 W_1^T. The hidden state itself is needed only at the end:
h_n = h_0 + W_1^T S, S = sum of alpha c.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from recontrol.ascent.arguments import AscentArguments
from recontrol.ascent.backends.base import Backend
from recontrol.ascent.oracle import ascend_loop, fraction_to_radius
from recontrol.value.prepared import Prepared


class _Path:
    """The value function with its heads folded into one output, seen from the pre-activations of its first layer."""

    def __init__(self, prepared: Prepared, head_weights: Tensor):
        weights, biases = prepared.wide_weights, prepared.wide_biases
        self.out, self.offset = prepared.output(head_weights)
        self.middle = list(zip(weights[1:-1], biases[1:-1], strict=True))
        self.linear = len(weights) == 1
        # A linear V has one "unit" without a ReLU: z = w.h.
        self.first = self.out[None] if self.linear else weights[0]
        self.first_bias = None if self.linear else biases[0]
        self.gram = self.first @ self.first.T if self.linear else prepared.gram

    def objective_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """V and c = dV/dz: (rows, dims[1]) -> (rows,), (rows, dims[1])."""
        if self.linear:
            return z[:, 0] + self.offset, torch.ones_like(z)
        zs = [z]
        for weight, bias in self.middle:
            zs.append(linear(torch.relu(zs[-1]), weight, bias))
        values = torch.relu(zs[-1]) @ self.out + self.offset
        slope = self.out * (zs[-1] > 0)
        for (weight, _), below in zip(reversed(self.middle), reversed(zs[:-1]), strict=True):
            slope = (slope @ weight) * (below > 0)
        return values, slope


class TorchBackend(Backend):
    """The closed form."""

    name = "torch"

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`; rows that are done have a scale of zero and stay where they are."""
        arguments.check()
        path = _Path(prepared, arguments.head_weights)
        live_steps, most = arguments.live_steps(), arguments.most_steps()
        start = arguments.hidden.to(prepared.compute_dtype)
        z = linear(start, path.first, path.first_bias)  # (rows, dims[1])
        total, lost = torch.zeros_like(z), torch.zeros_like(z)  # S, and what its last rounding lost
        edit_square = z.new_zeros(z.shape[0])  # u.u
        stopped = torch.zeros_like(live_steps, dtype=torch.bool)
        trace = z.new_empty(z.shape[0], trace_columns)
        for step in range(most):
            values, slope = path.objective_and_slope(z)
            if trace_columns:
                trace[:, step] = values
            scale = arguments.step_size if arguments.target is None else 2 * arguments.step_size * (arguments.target - values)
            scale = torch.where((step < live_steps) & ~stopped, scale, 0)
            velocity = slope @ path.gram  # (rows, dims[1])
            if arguments.radius is not None:
                square = scale * scale * (slope * velocity).sum(1)
                dot = scale * (total * velocity).sum(1)
                room = torch.clamp(arguments.radius * arguments.radius - edit_square, min=0)
                leaves = 2 * dot + square > room
                fraction = torch.where(leaves, fraction_to_radius(square, dot, room), 1)
                stopped = stopped | leaves
                scale = scale * fraction
                edit_square = edit_square + fraction * (2 * dot + fraction * square)
            z = z + scale[:, None] * velocity
            # Step after step adds nearly the same, so plain sums would round the same way each time (Kahan 1965).
            term = scale[:, None] * slope - lost
            grown = total + term
            total, lost = grown, (grown - total) - term
        if trace_columns:
            trace[:, most] = path.objective_and_slope(z)[0]
        edited = (start + total @ path.first).to(arguments.hidden.dtype)
        return torch.where((live_steps > 0)[:, None], edited, arguments.hidden), trace


class OracleBackend(Backend):
    """The autograd loop of `recontrol.oracle`."""

    name = "oracle"

    def run(self, arguments: AscentArguments, prepared: Prepared, trace_columns: int) -> tuple[Tensor, Tensor]:
        """As `Backend.run`."""
        arguments.check()
        edited, trace = ascend_loop(arguments, prepared.weights, prepared.biases, prepared.compute_dtype)
        return edited, trace if trace_columns else trace.new_empty(trace.shape[0], 0)
