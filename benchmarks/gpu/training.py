"""A step of training a value function on a GPU: the fused Triton kernels against plain PyTorch, time and peak memory."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.records import Outcome
from benchmarks.gpu.timing import measure_on, synchronize
from benchmarks.race import Variant, race
from benchmarks.value_nets import draw_hidden, initialised
from recontrol import ValueFunction
from recontrol.training.fused import fused_values, why_not

RESPONSES, TOKENS, SIZE = 512, 128, 4096
TINY_RESPONSES, TINY_TOKENS, TINY_SIZE = 2, 4, 32
SEED_STATES, LEARNING_RATE = 20, 1e-4
# Of the gradient of W1. Plain PyTorch in bfloat16 rounds activations and gradients, in tf32 the factors of products.
GRADIENT_ERROR = {"torch": 1e-4, "torch_tf32": 1e-2, "torch_autocast": 5e-2, "triton": 1e-3}


def run(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """One case: the paper's batch, with responses of full length."""
    responses, tokens, size = (TINY_RESPONSES, TINY_TOKENS, TINY_SIZE) if tiny else (RESPONSES, TOKENS, SIZE)
    yield case(responses, tokens, size), functools.partial(measure, responses, tokens, size, device, tiny)


def case(responses: int, tokens: int, size: int) -> str:
    """In words."""
    return f"training step, 2 layers, H = D = {size}, {responses} responses of {tokens} tokens"


def plain(value: ValueFunction, hidden: Tensor) -> Tensor:
    """V as autograd takes it, float32."""
    return value(hidden)


def with_tf32(value: ValueFunction, hidden: Tensor) -> Tensor:
    """V with the products of float32 numbers in tf32."""
    return value(hidden)


def with_autocast(value: ValueFunction, hidden: Tensor) -> Tensor:
    """V with products in bfloat16."""
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return value(hidden).float()


class Step:
    """Forward, mean of squared errors, backward and Adam on one batch; each step has a network and moments of its own."""

    def __init__(self, value: ValueFunction, evaluate: Callable[[ValueFunction, Tensor], Tensor], hidden: Tensor, wanted: Tensor) -> None:
        self.value = copy.deepcopy(value)
        self._evaluate, self._hidden, self._wanted = evaluate, hidden, wanted
        self._optimiser = torch.optim.Adam(self.value.parameters(), lr=LEARNING_RATE, fused=hidden.is_cuda or None)

    def gradients(self) -> Tensor:
        """The gradient of W1 at the present weights."""
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, self._evaluate is with_tf32
        try:
            self._optimiser.zero_grad()
            torch.nn.functional.mse_loss(self._evaluate(self.value, self._hidden), self._wanted).backward()
            return self.value.parameters_by_kind[0][0].grad
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def __call__(self) -> None:
        """Take the step."""
        self.gradients()
        self._optimiser.step()


def measure(responses: int, tokens: int, size: int, device: torch.device, tiny: bool) -> Outcome:
    """Time the step of each kind, with its peak memory; its gradient is compared with that of plain float32 first."""
    outcome = Outcome()
    # Drawn in pieces, as few as fit in memory beside each other; states are stored in bfloat16.
    pieces = [draw_hidden(tokens * max(1, responses // 16), size, SEED_STATES + k) for k in range(min(16, responses))]
    hidden = torch.cat([states.bfloat16() for states, _ in pieces]).to(device)
    wanted = torch.cat([reward for _, reward in pieces])[:, None].to(device)
    value = initialised(size, (size,)).to(device)
    kinds: dict[str, Any] = {"torch": plain, "triton": fused_values}
    if device.type == "cuda":
        kinds |= {"torch_tf32": with_tf32, "torch_autocast": with_autocast}
    expected = Step(value, plain, hidden, wanted).gradients().clone()
    variants = []
    for name, evaluate in kinds.items():
        with outcome.attempt(name):
            reason = why_not(value, hidden) if name == "triton" else None
            if reason is not None:
                raise RuntimeError(reason)
            step = Step(value, evaluate, hidden, wanted)
            error = float((step.gradients() - expected).norm() / expected.norm())
            assert error <= GRADIENT_ERROR[name], f"the gradient of W1 is off by {error:.1e} of its norm, allowed is {GRADIENT_ERROR[name]:.0e}"
            # The moments of Adam, and what the first step compiles.
            step()
            step.value.zero_grad(set_to_none=True)
            variants.append(Variant(name, step, "one step", 3))
            outcome.columns[name] = {"detail": f"gradient off by {error:.0e}", "peak_bytes": peak_bytes(step, device)}
    outcome.timings = race(variants, 0.01 if tiny else 2.0, 2 if tiny else 20, measure_on(device))
    outcome.shared = {
        "suite": "training",
        "layers": 2,
        "weights": "initialised",
        "batch": responses,
        "hidden_size": size,
        "width": size,
        "step_size": 0.0,
        "steps": 0,
        "dtype": "bfloat16 states, float32 weights",
        "tokens": len(hidden),
    }
    return outcome


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most memory in use at once during a step, beyond weights, moments and states, which are there before; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    step.value.zero_grad(set_to_none=True)
    return peak
