"""The effect of control on the next token at given states, without decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recontrol.decoding.control import Control
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.decoding.hooks import input_device
from recontrol.methods.control import climb
from recontrol.value import ValueFunction

# States in one ascent and one forward call: their logits over a large vocabulary are most of the memory.
STATES_AT_ONCE = 256


@dataclass(frozen=True)
class PathPoint:
    """The effect of `steps` steps of size `step_size` on the next token, as means over states.

    `value` and `reward` are V(h + u_n), with several heads their weighted sum, in V's own unit and in that of the reward; `edit_norm` is |u_n|; `kl` is
    KL(p || q) in nats, of the next-token distribution p of h + u_n and that of h, q, before temperature and the like.
    """

    step_size: float
    steps: int
    value: float
    reward: float
    edit_norm: float
    kl: float


def path_of_steps(
    model: Any,
    states: Tensor,
    value: ValueFunction,
    step_size: float,
    steps: Sequence[int] = (0, 10, 20, 30, 50),
    *,
    backend: str = "auto",
    allow_other_model: bool = False,
    **settings: Any,
) -> list[PathPoint]:
    """Mean V(h + u_n), |u_n| and KL(softmax(W_lm (h + u_n)) || softmax(W_lm h)) over states h: one point for each n, in order.

    With the states of rollouts this is the frontier of the next token at the uncontrolled model's own prefixes, for the cost of the output embedding;
    control changes the prefixes too, which `evaluate` measures. Logits include what the model does after the output embedding.

    Args:
        model: the language model, without a `Controller`; it is left as it was.
        states: (states, hidden_size), floating point: states that were read to sample tokens, as `Rollouts` and `record_hidden_states` have them.
        value: the value function to climb, on the model's device.
        step_size: alpha.
        steps: the numbers of steps, in any order; 0 is the uncontrolled model.
        backend: as for `recontrol.ascend`.
        allow_other_model: accept a value function that was trained on the states of another model.
        settings: further ones of `Control`: radius, target, head_weights. Errors are those of `Control` and of `Controller.attach`.
    """
    controls = [Control(value, step_size, n, **settings) for n in steps]
    if not controls:
        raise ValueError("there are no numbers of steps to try")
    if not isinstance(states, Tensor) or states.dim() != 2 or not states.shape[0] or states.shape[1] != value.hidden_size:
        found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(f"states must be a tensor of shape (states, {value.hidden_size}) with at least one of them, found {found}")
    weights = torch.tensor(controls[0].head_weights or [1.0], dtype=torch.float64, device="cpu")
    sums = torch.zeros(len(controls), 4, dtype=torch.float64, device="cpu")
    reading = _Reading(model)
    check_fit(reading, value, allow_other_model)
    reading.attach()
    with torch.no_grad(), reading:
        for chunk in states.split(STATES_AT_ONCE):
            hidden = chunk.to(value.device, reading.dtype())
            plain = reading.logits(hidden)
            for place, control in enumerate(controls):
                edited = climb(hidden, control, backend=backend)
                heads = value(edited).double().cpu()
                norms, moved = (edited.double() - hidden.double()).norm(dim=-1), divergence(reading.logits(edited), plain)
                sums[place] += torch.stack([row.double().cpu().sum() for row in (heads @ weights, value.to_reward(heads) @ weights, norms, moved)])
    return [PathPoint(control.step_size, control.steps, *mean) for control, mean in zip(controls, (sums / len(states)).tolist(), strict=True)]


class _Reading(Editing):
    """Puts given states in the place of the model's own."""

    @torch.compiler.disable
    def edit(self, hidden: Tensor, rows: Any) -> Tensor:
        """The given states in the place of the model's."""
        return self.given[:, None]

    def logits(self, states: Tensor) -> Tensor:
        """(states, hidden_size) -> (states, vocabulary), the logits that the model computes from these states."""
        self.given = states
        return self.owner(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=input_device(self.owner)), use_cache=False).logits[:, -1]
