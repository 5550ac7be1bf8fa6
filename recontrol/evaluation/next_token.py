"""What control does to the next token, along states that are there already: no decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from recontrol.ascent.ascend import ascend
from recontrol.checks import integer
from recontrol.decoding.control import Control
from recontrol.decoding.divergence import divergence
from recontrol.decoding.editing import Editing, check_fit
from recontrol.value import ValueFunction

# States in one ascent and one forward call: their logits over a large vocabulary are most of the memory.
STATES_AT_ONCE = 256


@dataclass(frozen=True)
class PathPoint:
    """The means over states of what n steps do to the next token.

    Attributes:
        step_size: alpha.
        steps: n.
        value: V(h + u_n), with several heads their weighted sum, in V's own unit.
        reward: the same in the unit of the reward: what V predicts, not what a reward model says.
        edit_norm: |u_n|.
        kl: KL(p || q) in nats, of the next-token distribution p of h + u_n and that of h, q, before temperature and the like.
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
    radius: float | None = None,
    target: float | None = None,
    head_weights: Sequence[float] | None = None,
    backend: str = "auto",
    allow_other_model: bool = False,
) -> list[PathPoint]:
    """Mean V(h + u_n), |u_n| and KL(softmax(W_lm (h + u_n)) || softmax(W_lm h)) over states h, for each n.

    With the states of rollouts these are the next-token frontier at the uncontrolled model's own prefixes, for the price of the output
    embedding. It is exact for one next token; it is not that of whole responses, in which control chooses the prefixes too: their divergence
    is the sum over tokens at their own prefixes (`recontrol.tuning.sweep`). Use it to see which settings are worth decoding.

    Logits are what the model makes of the states, whatever it does to them after the output embedding.

    Args:
        model: the language model, without a `Controller`; it is left as it was.
        states: (states, hidden_size), floating point: states that were read to sample tokens, as `Rollouts` and `record_hidden_states` have them.
        value: the value function to climb, on the model's device.
        step_size: alpha.
        steps: the numbers of steps, in any order; 0 is the uncontrolled model.
        radius: cut the edit where its norm reaches this.
        target: climb towards this value instead of upward, in V's own unit.
        head_weights: (num_heads,) numbers, the objective is the weighted sum of the heads; required if there are several.
        backend: as for `recontrol.ascend`.
        allow_other_model: accept a value function that was trained on the states of another model.

    Returns:
        One point for each n, in order.

    Raises:
        TypeError: arguments of the wrong type, or a value function that does not go with the model's dtype.
        ValueError: no states or of the wrong shape, no steps, a number that is negative or NaN, or a value function of another size, device or model.
        RuntimeError: a `Controller` is attached, the backend cannot run here, or edits do not reach the logits.
    """
    control = Control(value, step_size, max([integer("steps", n) for n in steps], default=0), radius, target, head_weights=head_weights)
    if not steps:
        raise ValueError("there are no numbers of steps to try")
    if not isinstance(states, Tensor) or states.dim() != 2 or not states.shape[0] or states.shape[1] != value.hidden_size:
        found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(f"states must be a tensor of shape (states, {value.hidden_size}) with at least one of them, found {found}")
    weights = torch.tensor([1.0] if head_weights is None else head_weights, dtype=torch.float64)
    sums = torch.zeros(len(steps), 4, dtype=torch.float64)
    with torch.no_grad(), _Reading(model, value, allow_other_model) as reading:
        for chunk in states.split(STATES_AT_ONCE):
            hidden = chunk.to(value.device, reading.dtype())
            plain = reading.logits(hidden)
            for place, n in enumerate(steps):
                edited = cast(
                    Tensor,
                    ascend(hidden, value, control.step_size, n, radius=radius, target=target, head_weights=weights.to(value.device), backend=backend),
                )
                heads = value(edited).double().cpu()
                norms = (edited.double() - hidden.double()).norm(dim=-1)
                moved = divergence(reading.logits(edited), plain)
                rows = [heads @ weights, value.to_reward(heads) @ weights, norms.cpu(), moved.double().cpu()]
                sums[place] += torch.stack([row.sum() for row in rows])
    return [PathPoint(control.step_size, n, *mean) for n, mean in zip(steps, (sums / len(states)).tolist(), strict=True)]


class _Reading(Editing):
    """Puts given states where the model would read its own.

    Args:
        model: a causal language model.
        value: the value function that is to be climbed.
        allow_other_model: accept one that was trained on the states of another model.
    """

    def __init__(self, model: Any, value: ValueFunction, allow_other_model: bool):
        super().__init__(model)
        self._states: Tensor | None = None
        check_fit(self, value, allow_other_model)
        self.attach()

    def logits(self, states: Tensor) -> Tensor:
        """What the model makes of states: (states, hidden_size) -> (states, vocabulary)."""
        self._states = states
        try:
            # One token, of which nothing but its place is used.
            output = self.owner(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.owner.device), use_cache=False)
        finally:
            self._states = None
        return output.logits[:, -1]

    @torch.compiler.disable
    def edit(self, hidden: Tensor, rows: Any) -> Tensor | None:
        """The given states in the place of the model's."""
        return None if self._states is None else self._states[:, None]
