"""Checks of arguments and words for messages, shared by every room."""

import contextlib
import importlib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# How many of a long list a message names.
SHOWN = 8


def number(name: str, given: Any, minimum: float = -math.inf) -> float:
    """A finite float of at least `minimum`, which is 0 or no minimum; a TypeError or ValueError that begins with `name` for anything else."""
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{name} must be a number, found {given!r}")
    wanted = f"{name} must be finite{' and 0 or more' if minimum == 0 else ''}"
    try:
        found = float(given)
    except OverflowError:
        raise ValueError(f"{wanted}, found a number too large for a float") from None
    if not math.isfinite(found) or found < minimum:
        raise ValueError(f"{wanted}, found {given!r}")
    return found


def integer(name: str, given: Any, minimum: int = 0) -> int:
    """An int of at least `minimum`; a TypeError or ValueError that begins with `name` for anything else."""
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise TypeError(f"{name} must be {'integers' if name.endswith('_ids') else 'an integer'}, found {given!r}")
    if given < minimum:
        raise ValueError(f"{name} must be {f'an integer of at least {minimum}' if minimum else '0 or more'}, found {given!r}")
    return int(given)


def several(name: str, given: Any) -> Iterable[Any]:
    """What may be iterated over and is no text, a tensor as a list; a TypeError that begins with `name` for anything else."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, found {given!r}")
    return given


def first_few(items: Sequence[Any]) -> str:
    """`1, 2, 3`, or the first eight and how many more."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def usable_device(device: str | torch.device) -> torch.device:
    """The device; a ValueError where torch cannot use it on this machine."""
    try:
        return torch.empty(0, device=device).device
    # A build without the device's library has an AssertionError for it.
    except Exception as error:
        raise ValueError(f"the device {str(device)!r} cannot be used here: {str(error).partition(chr(10))[0]}") from error


@contextlib.contextmanager
def loading(name: Any) -> Iterator[None]:
    """Make errors that say nothing of what is loaded, as of damaged files, a ValueError that does."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, ValueError, ImportError, RuntimeError, MemoryError)):
            raise
        raise ValueError(f"{name} cannot be loaded, are its files whole and no pointers of git-lfs? {type(error).__name__}: {error}") from error


def required(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package; an ImportError that names the extra of recontrol that brings it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {module.split('.')[0]} ({error}): pip install 'recontrol[{extra}]'") from error


def renamed(old: str, new: str) -> None:
    """Warn once, at the line outside this package that uses it, that a name has changed."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "recontrol":
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} is now {new}; the old name will go", DeprecationWarning, stacklevel=level)
