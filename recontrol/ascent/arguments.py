"""Checking the arguments of an ascent and bringing them to one shape."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recontrol.checks import dtype_name, first_few, wide_dtype
from recontrol.value import ValueFunction

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATING_NAMES = ", ".join(map(dtype_name, FLOATING))


class RowOption(NamedTuple):
    """A setting of the ascent that may differ from row to row."""

    name: str
    minimum: float = -math.inf
    optional: bool = False
    integer: bool = False


# Also the settings of a `Control`. A new one is an entry here, a field below, an argument of `ascend` and of the oracle, and what the backends do with it.
ROW_OPTIONS = (
    RowOption("step_size", minimum=0),
    RowOption("steps", minimum=0, integer=True),
    RowOption("radius", minimum=0, optional=True),
    RowOption("target", optional=True),
)


class AscentArguments(NamedTuple):
    """The arguments of one ascent as tensors on the device of the hidden states, in the order in which kernels and the operator take them."""

    hidden: Tensor  # (rows, hidden_size), floating point
    step_size: Tensor  # (rows,), float32 or float64
    steps: Tensor  # (rows,), int64
    mask: Tensor | None  # (rows,), bool, None when every row is live
    radius: Tensor | None  # (rows,), float32 or float64
    target: Tensor | None  # (rows,), float32 or float64
    head_weights: Tensor  # (num_heads,), float32 or float64

    def live_steps(self) -> Tensor:
        """The number of steps of each row, 0 where it is masked out: (rows,), int64."""
        return self.steps if self.mask is None else torch.where(self.mask, self.steps, 0)

    def most_steps(self) -> int:
        """The largest number of steps of any row; the trace has one column more."""
        return int(self.steps.max()) if self.steps.numel() else 0

    def check(self) -> None:
        """Refuse invalid values with a ValueError that names the rows. Skipped while a CUDA graph is captured: there are no values yet."""
        if self.hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        checks = [("head_weights must be finite", "head", self.head_weights, -math.inf)]
        for option in ROW_OPTIONS:
            wanted = " and ".join(["finite"] * (not option.integer) + ["0 or more"] * (option.minimum == 0))
            checks.append((f"{option.name} must be {wanted}", "row", getattr(self, option.name), option.minimum))
        bad = [(wanted, noun, given, ~torch.isfinite(given) | (given < minimum)) for wanted, noun, given, minimum in checks if given is not None]
        bad_states = ~torch.isfinite(self.hidden).all(dim=1) & (self.live_steps() > 0)
        # One look at one number, because each look waits for the device.
        if not torch.cat([bad_states, *(entries for *_, entries in bad)]).any():
            return
        for wanted, noun, given, entries in bad:
            if entries.any():
                raise ValueError(f"{wanted}, found {given[entries][0].item()} in {_places(entries, noun)}")
        raise ValueError(f"hidden states must be finite; NaN or infinite values in {_places(bad_states, 'row')} of {self.hidden.shape[0]}")


def normalise(
    hidden: Tensor,
    value: ValueFunction,
    step_size: float | Tensor,
    steps: int | Tensor,
    mask: Tensor | None = None,
    radius: float | Tensor | None = None,
    target: float | Tensor | None = None,
    head_weights: Tensor | Sequence[float] | None = None,
) -> AscentArguments:
    """Check types, shapes, dtypes and devices (TypeError, ValueError) and spread scalars over the rows; `AscentArguments.check` checks values."""
    _check_states(hidden, value)
    dtype = wide_dtype(hidden.dtype)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise TypeError(f"mask must be a bool tensor, found {getattr(mask, 'dtype', type(mask).__name__)}")
    if isinstance(steps, bool | float) or (isinstance(steps, Tensor) and (steps.is_floating_point() or steps.dtype == torch.bool)):
        raise TypeError(f"steps must be an integer or an integer tensor, found {steps.dtype if isinstance(steps, Tensor) else steps!r}")
    return AscentArguments(
        hidden.detach(),
        _spread("step_size", step_size, hidden, dtype),
        _spread("steps", steps, hidden, torch.int64),
        None if mask is None else _spread("mask", mask, hidden, torch.bool),
        None if radius is None else _spread("radius", radius, hidden, dtype),
        None if target is None else _spread("target", target, hidden, dtype),
        _head_weights(head_weights, value.num_heads, hidden.device, dtype),
    )


def _check_states(hidden: Any, value: Any) -> None:
    """Refuse hidden states and a value function that do not go together."""
    if not isinstance(value, ValueFunction):
        raise TypeError(f"value must be a recontrol.ValueFunction, found {type(value).__name__}")
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOATING:
        raise TypeError(f"hidden must be a tensor of {_FLOATING_NAMES}, found {getattr(hidden, 'dtype', type(hidden).__name__)}")
    if hidden.dim() != 2 or hidden.shape[1] != value.hidden_size:
        raise ValueError(f"hidden must have shape (rows, {value.hidden_size}) for this value function, found {tuple(hidden.shape)}")
    weights, biases = value.parameters_by_kind
    dtype = weights[0].dtype
    dtypes = {parameter.dtype for parameter in (*weights, *biases)}
    if len(dtypes) != 1 or dtype not in FLOATING:
        raise TypeError(f"the weights of the value function must share one dtype of {_FLOATING_NAMES}, found {sorted(map(str, dtypes))}")
    if (hidden.dtype == torch.float64) != (dtype == torch.float64):
        raise TypeError(f"float64 goes with float64 only: hidden is {hidden.dtype}, the value function is {dtype}")
    devices = {parameter.device for parameter in (*weights, *biases)}
    if devices != {hidden.device}:
        raise ValueError(f"hidden is on {hidden.device}, the value function on {', '.join(sorted(map(str, devices)))}; move one of them")


def _head_weights(given: Any, num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights of the heads on the device of the hidden states; they may come from another one."""
    if given is None:
        if num_heads != 1:
            raise ValueError(f"the value function has {num_heads} heads: give head_weights, a tensor of {num_heads} weights")
        return torch.ones(1, dtype=dtype, device=device)
    try:
        weights = torch.as_tensor(given, device=None if isinstance(given, Tensor) else device).detach()
        if not isinstance(given, Tensor) and weights.is_floating_point():
            # Once more, since the first time they were rounded to the default dtype.
            weights = torch.as_tensor(given, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"head_weights must be a tensor or a list of {num_heads} numbers, found {given!r}") from None
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"head_weights must be real numbers, found {weights.dtype}")
    if weights.is_meta and device.type != "meta":
        raise ValueError(f"head_weights is on {weights.device}, hidden on {device}; move one of them")
    if weights.shape != (num_heads,):
        raise ValueError(f"head_weights must have shape ({num_heads},), found {tuple(weights.shape)}")
    return weights.to(dtype=dtype, device=device)


def _spread(name: str, given: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A (rows,) tensor from a scalar or a (rows,) tensor."""
    rows, device = hidden.shape[0], hidden.device
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise TypeError(f"{name} must be a number or a tensor, found {type(given).__name__}")
        if torch.compiler.is_compiling() and isinstance(given, float):
            # `full` would compile again for every other float.
            return torch.ones(rows, dtype=dtype, device=device) * given
        try:
            return torch.full((rows,), given, dtype=dtype, device=device)
        except (RuntimeError, OverflowError):
            raise ValueError(f"{name} must be a number that {dtype_name(dtype)} can hold, found {given!r}") from None
    if given.is_complex() or (given.dtype == torch.bool) != (dtype == torch.bool):
        raise TypeError(f"{name} must be a number or a tensor of real numbers, found {given.dtype}")
    if given.device != device and (given.dim() > 0 or given.is_meta):
        raise ValueError(f"{name} is on {given.device}, hidden on {device}; move one of them")
    if given.shape not in ((), (1,), (rows,)):
        raise ValueError(f"{name} must be a scalar or have shape ({rows},), one entry a row, found {tuple(given.shape)}")
    return given.detach().to(dtype=dtype, device=device).expand(rows).contiguous()


def _places(bad: Tensor, noun: str) -> str:
    """`row 2`, or `rows 1, 3`."""
    numbers = bad.nonzero().flatten().tolist()
    return f"{noun}{'s' if len(numbers) > 1 else ''} {first_few(numbers)}"
