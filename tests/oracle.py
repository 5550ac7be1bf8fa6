"""How a result is compared with the float64 oracle, in one place.

The tolerances are not chosen by taste. The edit u = h_n - h_0 of a float32 computation is compared with the float64 oracle on
the same weights, and its relative error must be no worse than that of the autograd loop of the released code run in float32,
or than what rounding the result once to its own dtype costs, whichever is larger.
"""

import copy

import torch
from torch import Tensor

import recontrol as rc
from recontrol.ascent.backends import BACKENDS


def runs_on_cpu(status: dict) -> bool:
    """Whether a backend with this status takes tensors on the CPU; that of Triton where its interpreter stands in for a GPU (conftest.py)."""
    return status["available"] and (status["device"] == "any" or "cpu" in status["device"])


RUNNING = [name for name, backend in BACKENDS.items() if runs_on_cpu(backend.status())]

# Unit roundoff u of each dtype; rounding x once moves it by at most u * |x|.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def oracle(hidden: Tensor, value: rc.ValueFunction, step_size=0.5, steps=30, **options) -> tuple[Tensor, Tensor]:
    """The edited states and the trace in float64, from the very weights that the tested backend reads."""
    exact = copy.deepcopy(value).double()
    options = {name: option.double() if isinstance(option, Tensor) and option.is_floating_point() else option for name, option in options.items()}
    return rc.oracle.ascend(hidden.double(), exact, step_size, steps, return_trace=True, **options)


def released_loop(hidden: Tensor, value: rc.ValueFunction, step_size: float, steps: int) -> Tensor:
    """SGD on the hidden state itself, in the dtype of the hidden state and the weights."""
    state = hidden.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([state], lr=step_size)
    for _ in range(steps):
        optimizer.zero_grad()
        (-value(state).sum()).backward()
        optimizer.step()
    return state.detach()


def edit_error(edited: Tensor, exact: Tensor, hidden: Tensor) -> Tensor:
    """|u - u64| / |u64| of each row: (rows,)."""
    return (edited.double() - exact).norm(dim=1) / (exact - hidden.double()).norm(dim=1)


def rounding_error(exact: Tensor, hidden: Tensor) -> Tensor:
    """What rounding the exact result once to the dtype of `hidden` costs at the most, relative to the edit: (rows,)."""
    return ROUNDOFF[hidden.dtype] * exact.norm(dim=1) / (exact - hidden.double()).norm(dim=1)


def product_error(value: rc.ValueFunction) -> float:
    """What the one product W1^T S at the end costs in float32, relative to the edit, with random signs: sqrt(terms) roundings."""
    return ROUNDOFF[torch.float32] * value.hidden_dims[0] ** 0.5


def integers(*shape: int, low: int = -2, high: int = 2) -> Tensor:
    """Small whole numbers; sums of their products are exact in float32, so that results can be compared to the bit."""
    return torch.randint(low, high + 1, shape).float()


def whole_value_function(hidden_size: int, hidden_dims: tuple[int, ...]) -> rc.ValueFunction:
    """A value function of small whole weights; its pre-activations hit zero exactly, again and again."""
    value = rc.ValueFunction(hidden_size, hidden_dims)
    with torch.no_grad():
        for layer in value.layers:
            layer.weight.copy_(integers(*layer.weight.shape, low=-1, high=1))
            layer.bias.copy_(integers(*layer.bias.shape))
    return value
