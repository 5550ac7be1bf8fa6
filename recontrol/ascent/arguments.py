"""Checking the arguments of an ascent and bringing them to one shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recontrol.checks import dtype_name, first_few, wide_dtype
from recontrol.value import ValueFunction

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class RowOption:
    """An option of the ascent that may differ from row to row."""

    name: str
    minimum: float = -math.inf
    optional: bool = False
    integer: bool = False


# A new option is an entry here, a field of `AscentArguments`, an argument of `ascend` and of the oracle, and what the backends do with it.
ROW_OPTIONS = (
    RowOption("step_size", minimum=0),
    RowOption("steps", minimum=0, integer=True),
    RowOption("radius", minimum=0, optional=True),
    RowOption("target", optional=True),
)


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

    @property
    def of_rows(self) -> tuple[Tensor | None, ...]:
        """What has one entry a row, in the order in which kernels take it."""
        return self.step_size, self.steps, self.mask, self.radius, self.target

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
        checked = [(_bad(self.head_weights, -math.inf), self.head_weights, "head_weights must be finite", "head")]
        for option in ROW_OPTIONS:
            given = getattr(self, option.name)
            if given is not None:
                conditions = [*([] if option.integer else ["finite"]), *(["0 or more"] if option.minimum == 0 else [])]
                checked.append((_bad(given, option.minimum), given, f"{option.name} must be {' and '.join(conditions)}", "row"))
        bad_states = ~torch.isfinite(self.hidden).all(dim=1) & (self.live_steps() > 0)
        # One look at one number, because each look waits for the device.
        if not torch.cat([bad_states, *(bad for bad, *_ in checked)]).any():
            return
        for bad, given, wanted, noun in checked:
            if bad.any():
                places = bad.nonzero().flatten().tolist()
                raise ValueError(f"{wanted}, found {given[places[0]].item()} in {_places(places, noun)}")
        rows = bad_states.nonzero().flatten().tolist()
        raise ValueError(f"hidden states must be finite; NaN or infinite values in {_places(rows, 'row')} of {self.hidden.shape[0]}")


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
    rows, dtype, device = hidden.shape[0], wide_dtype(hidden.dtype), hidden.device
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, found {getattr(mask, 'dtype', type(mask).__name__)}")
        mask = _spread(mask, rows, torch.bool, device, "mask")
    given = {"step_size": step_size, "steps": steps, "radius": radius, "target": target}
    spread: dict[str, Any] = dict.fromkeys(given)
    for option in ROW_OPTIONS:
        number = given[option.name]
        if option.integer and not _may_be_integer(number):
            raise TypeError(f"{option.name} must be an integer or an integer tensor, found {number.dtype if isinstance(number, Tensor) else number!r}")
        if number is not None or not option.optional:
            spread[option.name] = _spread(number, rows, torch.int64 if option.integer else dtype, device, option.name)
    return AscentArguments(hidden=hidden.detach(), mask=mask, head_weights=_head_weights(head_weights, value.num_heads, dtype, device), **spread)


def _check_states(hidden: Any, value: Any) -> None:
    """Refuse hidden states and a value function that do not go together."""
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


def _head_weights(given: Any, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of the heads on the device of the hidden states; they may come from another one."""
    if given is None:
        if num_heads != 1:
            raise ValueError(f"the value function has {num_heads} heads: give head_weights, a tensor of {num_heads} weights")
        return torch.ones(1, dtype=dtype, device=device)
    try:
        weights = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"head_weights must be a tensor or a list of {num_heads} numbers, found {given!r}") from None
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"head_weights must be real numbers, found {weights.dtype}")
    if weights.is_meta and device.type != "meta":
        raise ValueError(f"head_weights is on {weights.device}, hidden on {device}; move one of them")
    if weights.shape != (num_heads,):
        raise ValueError(f"head_weights must have shape ({num_heads},), found {tuple(weights.shape)}")
    return weights.to(dtype=dtype, device=device)


def _spread(given: Any, rows: int, dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """A (rows,) tensor from a scalar or a (rows,) tensor."""
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


def _may_be_integer(given: Any) -> bool:
    if isinstance(given, Tensor):
        return not given.is_floating_point() and given.dtype != torch.bool
    return not isinstance(given, bool | float)


def _bad(given: Tensor, minimum: float) -> Tensor:
    return ~torch.isfinite(given) | (given < minimum)


def _places(numbers: list[int], noun: str) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {first_few(numbers)}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(dtype_name, dtypes))
