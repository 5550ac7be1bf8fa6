"""Value functions to measure: as initialised, and trained for a while on made-up hidden states that carry a signal."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recontrol import ValueFunction

# Written into a cached network; one made by another recipe is trained again.
RECIPE: dict[str, Any] = {"version": 1, "adam_steps": 60, "batch_size": 256, "learning_rate": 3e-4, "rank": 256, "noise": 1.0}
SEED_INITIAL, SEED_BASIS, SEED_TRAINING = 0, 1, 2


def draw_hidden(rows: int, hidden_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states as a final norm leaves them, and a reward that depends on them smoothly.

    A few hundred directions of decaying variance plus white noise, each state scaled to a root mean square of one.

    Returns:
        (rows, hidden_size), float32; (rows,), float32.
    """
    rank = min(RECIPE["rank"], hidden_size)
    basis = torch.randn(rank, hidden_size, generator=torch.Generator().manual_seed(SEED_BASIS))
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, rank, generator=generator) / torch.arange(1, rank + 1).sqrt()
    states = factors @ basis + RECIPE["noise"] * torch.randn(rows, hidden_size, generator=generator)
    reward = 2 * torch.tanh(factors[:, 0]) + factors[:, 1] * torch.tanh(factors[:, 2]) + 0.5 * torch.tanh(factors[:, 3:9].sum(1))
    return states / states.square().mean(1, keepdim=True).sqrt(), reward


def initialised(hidden_size: int, hidden_dims: tuple[int, ...]) -> ValueFunction:
    """A value function as PyTorch initialises it."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED_INITIAL)
        return ValueFunction(hidden_size, hidden_dims)


def trained(hidden_size: int, hidden_dims: tuple[int, ...], device: torch.device | str = "cpu") -> ValueFunction:
    """A value function after some steps of Adam on `device`, from the user's cache folder when it is there already."""
    folder = cache_folder() / f"value-{hidden_size}-{'-'.join(map(str, hidden_dims))}"
    if (folder / "config.json").is_file():
        value = ValueFunction.from_pretrained(folder, device=device)
        if value.provenance.get("recipe") == RECIPE:
            return value
    value = initialised(hidden_size, hidden_dims).to(device)
    value.provenance.update(recipe=RECIPE, explained=fit(value))
    value.save_pretrained(folder)
    return value


def fit(value: ValueFunction) -> float:
    """Train in place; return the share of the reward's variance that is explained on the last (unseen) batch."""
    optimiser = torch.optim.Adam(value.parameters(), lr=RECIPE["learning_rate"])
    explained = 0.0
    for step in range(RECIPE["adam_steps"]):
        hidden, reward = (drawn.to(value.device) for drawn in draw_hidden(RECIPE["batch_size"], value.hidden_size, SEED_TRAINING + step))
        loss = torch.nn.functional.mse_loss(value(hidden)[:, 0], reward)
        explained = 1 - float(loss.detach()) / float(reward.var())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Else the gradients of training would still be there when the released loop begins to accumulate.
    value.zero_grad(set_to_none=True)
    return explained


def cache_folder() -> Path:
    """Where trained networks are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recontrol" / "benchmarks"
