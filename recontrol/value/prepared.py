"""What the fast paths precompute from the weights of a value function, and when it must be computed again."""

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from recontrol.checks import wide_dtype

_next_key = itertools.count(1)
_caches: "weakref.WeakValueDictionary[int, PreparedCache]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Prepared:
    """The weights of a value function as every backend reads them, contiguous and in their own dtype, and what is computed from them alone."""

    weights: tuple[Tensor, ...]  # weights[l]: (dims[l + 1], dims[l])
    biases: tuple[Tensor, ...]  # biases[l]: (dims[l + 1],)

    @classmethod
    @torch.inference_mode(False)
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> "Prepared":
        """The one place where the parameters of a value function become what backends read."""
        return cls(tuple(weight.detach().contiguous() for weight in weights), tuple(bias.detach().contiguous() for bias in biases))

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """Half-precision weights accumulate in float32."""
        return wide_dtype(self.weights[0].dtype)

    @cached_property
    def wide_weights(self) -> tuple[Tensor, ...]:
        """The weights in the compute dtype."""
        return tuple(weight.to(self.compute_dtype) for weight in self.weights)

    @cached_property
    def wide_biases(self) -> tuple[Tensor, ...]:
        """The biases in the compute dtype."""
        return tuple(bias.to(self.compute_dtype) for bias in self.biases)

    @cached_property
    def gram(self) -> Tensor:
        """G = W_1 W_1^T: (dims[1], dims[1]), compute dtype. Moves pre-activations when hidden states move along W_1^T."""
        first = self.weights[0]
        # It is kept, so it must not depend on who asks first. A float64 product knows neither autocast nor TF32; some devices have none.
        wide = first.double() if first.device.type in ("cpu", "cuda", "meta") else first.cpu().double()
        return (wide @ wide.T).to(first.device, self.compute_dtype)

    @cached_property
    def second_transposed(self) -> Tensor:
        """W_2^T: (dims[1], dims[2]), stored dtype, contiguous, so that columns of W_2 are read as rows."""
        return self.weights[1].T.contiguous()

    def output(self, head_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer with its heads folded into one: weight, (dims[-2],), and bias, (), both in the compute dtype."""
        return head_weights @ self.wide_weights[-1], head_weights @ self.wide_biases[-1]


class PreparedCache:
    """Holds the `Prepared` of one value function until a weight changes, seen by its address, layout, dtype, device, version or a `torch.optim` step.

    In-place changes through `.data` or another library's view of the memory show in none of these; call `clear` after one.
    """

    def __init__(self) -> None:
        self.key = next(_next_key)
        self._lock = threading.Lock()
        self._stamp: tuple[Any, ...] | None = None
        self._prepared: Prepared | None = None
        self._stamped: tuple[Tensor, ...] = ()
        _caches[self.key] = self

    def __reduce__(self) -> tuple:
        # A copied or unpickled value function gets a cache of its own.
        return (PreparedCache, ())

    def get(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Prepared:
        """Return the cached `Prepared` if it was made from these weights as they are now, else a new one."""
        tensors = (*weights, *biases)
        # What identifies their present content; nothing does where they were made under inference_mode, without a version counter.
        stamp = None
        if not any(tensor.is_inference() for tensor in tensors):
            stamp = tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors)
        with self._lock:
            if self._prepared is None or stamp is None or stamp != self._stamp:
                # These aliases keep the storage alive, so that no new tensor can take a stamped address.
                self._stamped = tuple(tensor.detach() for tensor in tensors)
                self._prepared, self._stamp = Prepared.of(weights, biases), stamp
            return self._prepared

    def clear(self, addresses: set[int] | None = None) -> None:
        """Forget what was computed, with `addresses` only if one of the weights lies there."""
        with self._lock:
            if addresses is None or any(tensor.data_ptr() in addresses for tensor in self._stamped):
                self._prepared, self._stamp, self._stamped = None, None, ()


def cache_of(key: int) -> PreparedCache:
    """The cache with this key, or a fresh one when its value function is gone."""
    return _caches.get(key) or PreparedCache()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write the weights without raising their version counters."""
    addresses = {parameter.data_ptr() for group in optimizer.param_groups for parameter in group["params"]}
    for cache in list(_caches.values()):
        cache.clear(addresses)


register_optimizer_step_post_hook(_after_optimizer_step)
