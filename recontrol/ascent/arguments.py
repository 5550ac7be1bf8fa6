"""Checking the arguments of an ascent and bringing them to one shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recontrol.value import ValueFunction

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class AscentArguments:
    """The arguments of one ascent as tensors on the device of the hidden states.

    Tensors:
        hidden: (rows, hidden_size), floating point.
        step_size: (rows,), float32 or float64.
        steps: (rows,), int64.
        mask: (rows,), bool, or None when every row is live.
        radius: (rows,), float32 or float64, or None.
        target: (rows,), float32 or float64, or None.
        head_weights: (num_heads,), float32 or float64.
    """

    hidden: Tensor
    step_size: Tensor
    steps: Tensor
    mask: Tensor | None
    radius: Tensor | None
    target: Tensor | None
    head_weights: Tensor

    def live_steps(self) -> Tensor:
        """The number of steps of each row, 0 where it is masked out: (rows,), int64."""
        return self.steps if self.mask is None else torch.where(self.mask, self.steps, 0)

    def most_steps(self) -> int:
        """The largest number of steps of any row; the trace has one column more."""
        return int(self.steps.max()) if self.steps.numel() else 0

    def check(self) -> None:
        """Refuse values that cannot be meant. While a CUDA graph is captured there are no values to look at.

        Raises:
            ValueError: hidden states of live rows that are NaN or infinite (the rows are named), a step size, radius or
                target that is NaN, infinite or (the first two) negative, or a negative number of steps.
        """
        if self.hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        # All conditions in one number, because each look at a number waits for the device.
        bad = ~torch.isfinite(self.hidden).all(dim=1) & (self.live_steps() > 0)
        conditions = [
            (self.steps < 0, self.steps, "steps must be 0 or more", "row"),
            (~torch.isfinite(self.step_size) | (self.step_size < 0), self.step_size, "step_size must be finite and 0 or more", "row"),
            (~torch.isfinite(self.head_weights), self.head_weights, "head_weights must be finite", "head"),
        ]
        if self.radius is not None:
            conditions.append((~torch.isfinite(self.radius) | (self.radius < 0), self.radius, "radius must be finite and 0 or more", "row"))
        if self.target is not None:
            conditions.append((~torch.isfinite(self.target), self.target, "target must be finite", "row"))
        if not torch.cat([bad, *(condition for condition, *_ in conditions)]).any():
            return
        for condition, given, wanted, noun in conditions:
            _refuse(condition, given, wanted, noun)
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(f"hidden states must be finite; NaN or infinite values in {_some(rows, 'row')} of {self.hidden.shape[0]}")


def normalise(
    hidden: Tensor,
    value: ValueFunction,
    step_size: float | Tensor,
    steps: int | Tensor,
    mask: Tensor | None,
    radius: float | Tensor | None,
    target: float | Tensor | None,
    head_weights: Tensor | None,
) -> AscentArguments:
    """Check types, shapes, dtypes and devices and spread scalars over the rows. Values are checked by `AscentArguments.check`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or on the wrong device.
    """
    if not isinstance(value, ValueFunction):
        raise TypeError(f"value must be a recontrol.ValueFunction, found {type(value).__name__}")
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOATING:
        raise TypeError(f"hidden must be a tensor of {_names(FLOATING)}, found {getattr(hidden, 'dtype', type(hidden).__name__)}")
    if hidden.dim() != 2 or hidden.shape[1] != value.hidden_size:
        raise ValueError(f"hidden must have shape (rows, {value.hidden_size}) for this value function, found {tuple(hidden.shape)}")
    weights, biases = value.parameters_by_kind
    dtypes = {parameter.dtype for parameter in (*weights, *biases)}
    if len(dtypes) != 1 or value.dtype not in FLOATING:
        raise TypeError(f"the weights of the value function must share one dtype of {_names(FLOATING)}, found {sorted(map(str, dtypes))}")
    if (hidden.dtype == torch.float64) != (value.dtype == torch.float64):
        raise TypeError(f"float64 goes with float64 only: hidden is {hidden.dtype}, the value function is {value.dtype}")
    devices = {parameter.device for parameter in (*weights, *biases)}
    if devices != {hidden.device}:
        raise ValueError(f"hidden is on {hidden.device}, the value function on {', '.join(sorted(map(str, devices)))}; move one of them")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    if head_weights is None:
        if value.num_heads != 1:
            raise ValueError(f"the value function has {value.num_heads} heads: give head_weights, a tensor of {value.num_heads} weights")
        head_weights = torch.ones(1, dtype=dtype, device=hidden.device)
    else:
        head_weights = _head_weights(head_weights, value.num_heads, hidden.device).to(dtype=dtype, device=hidden.device)
        if head_weights.shape != (value.num_heads,):
            raise ValueError(f"head_weights must have shape ({value.num_heads},), found {tuple(head_weights.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, found {getattr(mask, 'dtype', type(mask).__name__)}")
        mask = _spread(mask, rows, torch.bool, hidden.device, "mask")
    if isinstance(steps, bool) or (isinstance(steps, Tensor) and (steps.is_floating_point() or steps.dtype == torch.bool)) or isinstance(steps, float):
        raise TypeError(f"steps must be an integer or an integer tensor, found {steps.dtype if isinstance(steps, Tensor) else steps!r}")
    return AscentArguments(
        hidden=hidden.detach(),
        step_size=_spread(step_size, rows, dtype, hidden.device, "step_size"),
        steps=_spread(steps, rows, torch.int64, hidden.device, "steps"),
        mask=mask,
        radius=None if radius is None else _spread(radius, rows, dtype, hidden.device, "radius"),
        target=None if target is None else _spread(target, rows, dtype, hidden.device, "target"),
        head_weights=head_weights,
    )


def _head_weights(given: Tensor | Sequence[float], num_heads: int, device: torch.device) -> Tensor:
    """The weights of the heads as given; numbers may come from another device than that of the hidden states."""
    try:
        weights = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"head_weights must be a tensor or a list of {num_heads} numbers, found {given!r}") from None
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"head_weights must be real numbers, found {weights.dtype}")
    if weights.is_meta and device.type != "meta":
        raise ValueError(f"head_weights is on {weights.device}, hidden on {device}; move one of them")
    return weights


def _spread(given: float | int | Tensor, rows: int, dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """A (rows,) tensor from a scalar or a (rows,) tensor."""
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise TypeError(f"{name} must be a number or a tensor, found {type(given).__name__}")
        if torch.compiler.is_compiling() and isinstance(given, float):
            # In `full` every other float would be compiled anew.
            return torch.ones(rows, dtype=dtype, device=device) * given
        try:
            return torch.full((rows,), given, dtype=dtype, device=device)
        except (RuntimeError, OverflowError):
            raise ValueError(f"{name} must be a number that {_names((dtype,))} can hold, found {given!r}") from None
    if given.is_complex() or (given.dtype == torch.bool) != (dtype == torch.bool):
        raise TypeError(f"{name} must be a number or a tensor of real numbers, found {given.dtype}")
    if given.device != device and (given.dim() > 0 or given.is_meta):
        raise ValueError(f"{name} is on {given.device}, hidden on {device}; move one of them")
    if given.shape not in ((), (1,), (rows,)):
        raise ValueError(f"{name} must be a scalar or have shape ({rows},), one entry a row, found {tuple(given.shape)}")
    return given.detach().to(dtype=dtype, device=device).expand(rows).contiguous()


def _refuse(bad: Tensor, given: Tensor, wanted: str, noun: str) -> None:
    if bad.any():
        places = bad.nonzero().flatten().tolist()
        raise ValueError(f"{wanted}, found {given[places[0]].item()} in {_some(places, noun)}")


def _some(numbers: list[int], noun: str) -> str:
    """`row 3`, `rows 1, 2`, or the first eight and how many more."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
