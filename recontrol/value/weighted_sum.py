"""Weighted sums of value functions: several objectives, one ascent."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from recontrol.value import ValueFunction


class WeightedSum(ValueFunction):
    """V(h) = sum_k weight_k V_k(h), written `0.7 * helpful + 0.3 * harmless`.

    It is one wider value function: the first layers are stacked, those in the middle are blocks on a diagonal, and the last ones are multiplied
    by the weights. So it is climbed by one ascent, and saved, loaded and served like any other. Its unit is that of the sum: where the
    V_k are standardised, the weights count standard deviations.

    The weights of the V_k are copied: make the sum once, and anew when one of them has changed.

    Args:
        terms: (weight, value function), all of the same depth, hidden size, heads, dtype and device.

    Attributes:
        terms: as given; sums among them are replaced by their own terms.

    Raises:
        TypeError: a weight that is no number, or something else than a value function.
        ValueError: no terms, a weight that is not finite, or value functions that do not go together.

    Source: Kong et al. 2024, section 4.3, for a sum in the place of V.
    """

    def __init__(self, terms: Sequence[tuple[float, ValueFunction]]):
        flat = _flattened(terms)
        first = flat[0][1]
        widths = [sum(value.hidden_dims[layer] for _, value in flat) for layer in range(len(first.hidden_dims))]
        provenance = {"terms": [{"weight": weight, **value.provenance} for weight, value in flat]}
        # Nothing is drawn at random for weights that are replaced.
        with torch.device("meta"):
            super().__init__(first.hidden_size, widths, first.num_heads, provenance=provenance)
        self.terms = flat
        self.to(first.dtype).to_empty(device=first.device)
        with torch.no_grad():
            for own, stacked in zip((parameter for kind in self.parameters_by_kind for parameter in kind), _stacked(flat), strict=True):
                own.copy_(stacked)

    def extra_repr(self) -> str:
        """Describe the sizes and the weights in `repr`."""
        return f"{super().extra_repr()}, weights={tuple(weight for weight, _ in self.terms)}"


def _flattened(terms: Sequence[tuple[float, ValueFunction]]) -> tuple[tuple[float, ValueFunction], ...]:
    """The terms with sums multiplied out, checked."""
    flat: list[tuple[float, ValueFunction]] = []
    for weight, value in terms:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"a weight must be a number, found {weight!r}")
        if not isinstance(value, ValueFunction):
            raise TypeError(f"a term must be a recontrol.ValueFunction, found {type(value).__name__}")
        inner = value.terms if isinstance(value, WeightedSum) else ((1.0, value),)
        flat += [(float(weight) * other, part) for other, part in inner]
    if not flat:
        raise ValueError("a weighted sum needs at least one term")
    for weight, _ in flat:
        if not torch.isfinite(torch.tensor(weight)):
            raise ValueError(f"weights must be finite, found {weight}")
    _check_kinds([value for _, value in flat])
    return tuple(flat)


def _check_kinds(values: Sequence[ValueFunction]) -> None:
    """Refuse value functions that cannot be stacked."""
    kinds: dict[str, list[Any]] = {
        "number of layers": [len(value.layers) for value in values],
        "hidden size": [value.hidden_size for value in values],
        "number of heads": [value.num_heads for value in values],
        "dtype": [value.dtype for value in values],
        "device": [value.device for value in values],
    }
    for name, found in kinds.items():
        if len(set(found)) > 1:
            raise ValueError(f"the value functions of a weighted sum must have the same {name}, found {', '.join(map(str, found))}")


def _stacked(terms: Sequence[tuple[float, ValueFunction]]) -> list[Tensor]:
    """All weights of the sum, then all biases, first layer first."""
    weights, biases = zip(*(value.parameters_by_kind for _, value in terms), strict=True)
    scales = [scale for scale, _ in terms]
    last = len(weights[0]) - 1
    stacked = []
    for layer in range(last + 1):
        parts = [part[layer] for part in weights]
        if layer == last:
            scaled = [scale * part for scale, part in zip(scales, parts, strict=True)]
            stacked.append(torch.cat(scaled, dim=1) if last else torch.stack(scaled).sum(0))
        else:
            stacked.append(torch.block_diag(*parts) if layer else torch.cat(parts))
    for layer in range(last):
        stacked.append(torch.cat([part[layer] for part in biases]))
    stacked.append(torch.stack([scale * part[last] for scale, part in zip(scales, biases, strict=True)]).sum(0))
    return stacked
