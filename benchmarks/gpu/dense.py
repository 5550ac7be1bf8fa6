"""The closed form in dense PyTorch as one would write it for a GPU: no host in the loop, so that a CUDA graph can hold it."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from recontrol import ValueFunction

# How the matrices are held and multiplied: in float32, in float32 through tf32 tensor cores, or in bfloat16 with sums in float32.
FORMS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class DenseForm:
    """z <- z + alpha G c with G = W1 W1^T given, h_n = h + alpha W1^T S, S = sum of c; G's product is left out of the last step.

    Args:
        value: bfloat16 weights, two or three linear layers, one head.
        form: one of `FORMS`.
        along: read G along its "rows" or its "columns"; it is symmetric.
        compiled: run each step through `torch.compile`.
    """

    value: ValueFunction
    form: str
    along: str = "rows"
    compiled: bool = False

    @property
    def name(self) -> str:
        """For example "bfloat16, G by rows"."""
        return f"{self.form}, G by {self.along}"

    @functools.cached_property
    def _matrices(self) -> tuple[Tensor, ...]:
        dtype = torch.bfloat16 if self.form == "bfloat16" else torch.float32
        gram = self.value.prepared().gram.to(dtype)
        weights = [weight.detach().to(dtype) for weight in self.value.parameters_by_kind[0]]
        return (weights[0], gram if self.along == "rows" else gram.T, *weights[1:-1])

    @functools.cached_property
    def _vectors(self) -> tuple[Tensor, ...]:
        weights, biases = self.value.parameters_by_kind
        return (weights[-1].detach()[0].float(), *(bias.detach().float() for bias in biases[:-1]))

    @torch.no_grad()
    def __call__(self, hidden: Tensor, step_size: float, steps: int) -> Tensor:
        """(rows, hidden_size) -> (rows, hidden_size), in the dtype of `hidden`, sums in float32."""
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, self.form == "tf32"
        try:
            first, gram, *second = self._matrices
            out, first_bias, *second_bias = self._vectors
            middle = (*second, *second_bias)
            z = _times(hidden, first.T) + first_bias
            total = torch.zeros_like(z)
            # A number would be compiled in, and each alpha anew.
            scale = torch.full((), step_size, device=z.device)
            step = _compiled_step if self.compiled else _step
            for _ in range(steps - 1):
                z, total = step(z, total, gram, out, middle, scale)
            total = total + _slope(z, out, middle)
            return (hidden.float() + step_size * _times(total, first)).to(hidden.dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times matrix in float32; bfloat16 products are exact, and added up in float32."""
    rows = rows.to(matrix.dtype)
    if matrix.dtype == torch.float32:
        return rows @ matrix
    return torch.mm(rows, matrix, out_dtype=torch.float32) if rows.is_cuda else rows.float() @ matrix.float()


def _slope(z: Tensor, out: Tensor, middle: tuple[Tensor, ...]) -> Tensor:
    """The slope c = dV/dz, from the pre-activations of the first layer."""
    if not middle:
        return torch.where(z > 0, out, 0)
    second, bias = middle
    above = _times(torch.relu(z), second.T) + bias
    return torch.where(z > 0, _times(torch.where(above > 0, out, 0), second), 0)


def _step(z: Tensor, total: Tensor, gram: Tensor, out: Tensor, middle: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, Tensor]:
    slope = _slope(z, out, middle)
    return z + scale * _times(slope, gram), total + slope


# As in benchmarks.baselines: one step, static shapes, and an error rather than an uncompiled run.
_compiled_step = torch.compile(_step, dynamic=False, fullgraph=True)
