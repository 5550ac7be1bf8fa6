"""Training a value function on rollouts of the uncontrolled model."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recontrol.data.rollouts import Rollouts
from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.fused import KERNELS, check_kernel, values_by
from recontrol.training.objectives import HeldOutError, td_loss
from recontrol.value import ValueFunction
from recontrol.version import __version__

logger = logging.getLogger(__name__)

# The paper's batch; small data get smaller ones, or one pass over them would be a handful of updates.
LARGEST_BATCH = 512
MINIBATCHES = 20
# Tokens in one forward call. It bounds memory, and splits a mini-batch between responses without changing its gradient.
TOKENS_AT_ONCE = 8192


def train(
    rollouts: Rollouts | str | os.PathLike,
    hidden_dims: Sequence[int] = (4096,),
    seed: int = 0,
    *,
    out: str | os.PathLike | None = None,
    learning_rate: float = 1e-4,
    batch_size: int | None = None,
    epochs: int = 100,
    patience: int | None = 10,
    validation_fraction: float = 0.1,
    td_lambda: float = 0.0,
    checkpoint_every: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    kernel: str = "torch",
    progress: bool = True,
) -> tuple[ValueFunction, list[dict[str, Any]]]:
    """Train V so that V(s_t) predicts the final reward of a response from the state that was read to sample its token t.

        loss = mean over tokens of (V(s_t) - target_t)^2,    target_t = V(s_{t+1}) without gradient,    target_T = r

    Adam, on mini-batches of whole responses read from disk as they are needed; one temporary copy of a few thousand states is
    all that is in memory. Each epoch takes the responses in an order that follows from the seed and the epoch.

    V starts as the mean reward of the training data, the same for every state: the weights of the last layer are zero, its bias is
    that mean. Inside, rewards are counted in standard deviations from it, for each head, and the last layer is scaled
    back at the end. The objective has no discount, so this changes no solution, only how Adam's learning rate relates
    to the unit of the reward; V is in the unit of the reward.

    Early stopping and the choice of the best epoch go by the Monte Carlo error on prompts held out, not by the TD error,
    which is nearly as small for a V that has learned nothing (see `HeldOutError`).

    Args:
        rollouts: what `collect` made, or its folder.
        hidden_dims: widths of the hidden layers; `(4096,)` is the paper's "two linear layers".
        seed: of the first weights, the split and the order of responses, 0 or more.
        out: folder for the value function (`ValueFunction.from_pretrained(out)`), `history.json` and, until the run is
            finished, a checkpoint. The same call takes up a run that was killed, with the same result, bit for bit on the CPU with as many
            threads, and returns the result of a finished one. None writes nothing.
        learning_rate: of Adam.
        batch_size: responses in a mini-batch at most; None is the paper's 512, or fewer, so that an epoch has 20 mini-batches.
        epochs: passes over the training data at most.
        patience: stop after so many epochs without a better one; None never stops early.
        validation_fraction: share of the prompts held out, at least one prompt; 0 trains on all, without early stopping,
            and keeps the last weights.
        td_lambda: mixes the final reward into the targets (see `bellman_targets`): 0 is the paper's objective, 1 is
            regression on the final reward. Values such as 0.95 need far fewer epochs on small data.
        checkpoint_every: mini-batches between checkpoints, which is what a kill loses at most.
        dtype: of the weights, torch.float32 or torch.float64.
        device: where to train; None is a GPU if there is one.
        kernel: what computes V and its gradient in training: "torch" is autograd, "triton" the fused kernels for two linear layers of
            float32 (see `recontrol.training.fused`). They round differently, so a run goes on only with its own. "torch" is
            the default, because the fused ones have not been measured on a GPU. Validation is by V itself.
        progress: show a progress bar.

    Returns:
        The value function of the best epoch, on `device`, and the history: one dict an epoch with epoch (from 0), train_td_loss and,
        with validation, validation_td_loss, validation_mc_error, validation_explained_variance and validation_correlation
        (see `HeldOutError.summary`). Losses are in squared units of the reward.

    Raises:
        ValueError: no rollouts, states or rewards that are not finite (the responses are named), a single prompt with
            `validation_fraction` above 0, a setting out of its range, or an `out` folder of another run.
        RuntimeError: `kernel` is "triton", and the fused kernels cannot run here; the message says why.
        FloatingPointError: training diverged.
        OSError: the disk is full; the message names the file, and the checkpoint before it stays.

    Source: Kong et al. 2024, section 4.2 and appendix (training of the value function).
    """
    rollouts = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    _check(learning_rate, batch_size, epochs, patience, validation_fraction, td_lambda, checkpoint_every, dtype, seed, kernel)
    if not len(rollouts):
        raise ValueError(f"{rollouts.path} has no responses to train on")
    rewards, lengths = rollouts.rewards.to(dtype), rollouts.lengths
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, found others in responses {_some((~rewards.isfinite().all(1)).nonzero()[:, 0])}")
    held_in, held_out = split_by_prompt(rollouts.groups, validation_fraction, seed)
    batch_size = batch_size or max(1, min(LARGEST_BATCH, len(held_in) // MINIBATCHES))
    mean, scale = _standardisation(rewards[held_in])
    settings = {
        "rollouts": _digest(rollouts),
        "hidden_dims": list(hidden_dims),
        "seed": seed,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "epochs": epochs,
        "patience": patience,
        "validation_fraction": validation_fraction,
        "td_lambda": td_lambda,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
    }
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    value = _initial_value(rollouts, hidden_dims, seed).to(device=device, dtype=dtype)
    check_kernel(kernel, value, torch.empty(0, rollouts.hidden_size, dtype=getattr(torch, rollouts.manifest["dtype"]), device=device))
    optimizer = torch.optim.Adam(value.parameters(), lr=learning_rate)
    folder = RunFolder(out, settings)
    if folder.path is not None and folder.finished:
        folder.clear()
        return ValueFunction.from_pretrained(folder.path, device=device), folder.history
    state, best = folder.load(value.state_dict(), optimizer)
    if state == Progress():
        _check_states(rollouts)

    batches = -(-len(held_in) // batch_size)
    bar = tqdm(total=epochs * batches, initial=state.epoch * batches + state.position, unit="batch", disable=not progress)
    try:
        with bar:
            while state.epoch < epochs and not _exhausted(state, patience):
                order = held_in[torch.from_numpy(np.random.default_rng([seed, state.epoch]).permutation(len(held_in)))]
                # Of equal size, rather than a last one of a few responses whose noise would weigh as much.
                for batch in order.tensor_split(batches)[state.position :]:
                    state.td_sum += _update(value, optimizer, rollouts, batch, mean, scale, td_lambda, kernel)
                    if not math.isfinite(state.td_sum):
                        raise FloatingPointError(f"training diverged in epoch {state.epoch}; lower learning_rate, now {learning_rate}")
                    state.position += 1
                    if state.position % checkpoint_every == 0:
                        folder.save(state, value.state_dict(), best, optimizer)
                    bar.update()
                    bar.set_postfix(epoch=state.epoch, td_loss=f"{state.td_sum / int(lengths[order[: len(order) * state.position // batches]].sum()):.4g}")
                entry: dict[str, Any] = {"epoch": state.epoch, "train_td_loss": state.td_sum / int(lengths[held_in].sum())}
                if len(held_out):
                    entry |= _validate(value, rollouts, held_out, mean, scale, td_lambda)
                # The last update of an epoch has no loss of its own to show it.
                finite = all(math.isfinite(number) for number in entry.values() if number is not None)
                if not (finite and all(parameter.isfinite().all() for parameter in value.parameters())):
                    raise FloatingPointError(f"training diverged in epoch {state.epoch}; lower learning_rate, now {learning_rate}")
                logger.info("%s", ", ".join(f"{name} {number:.4g}" for name, number in entry.items() if number is not None))
                state.history.append(entry)
                if not len(held_out) or state.best_epoch < 0 or _score(entry) > _score(state.history[state.best_epoch]):
                    state.best_epoch = state.epoch
                    best = {name: tensor.clone() for name, tensor in value.state_dict().items()}
                state.epoch, state.position, state.td_sum = state.epoch + 1, 0, 0.0
                folder.save(state, value.state_dict(), best, optimizer)
    except KeyboardInterrupt:
        kept = f"the same call goes on from the last checkpoint in {out}" if out is not None else "nothing was kept: there is no out folder"
        logger.warning("interrupted in epoch %d after %d of %d mini-batches; %s", state.epoch, state.position, batches, kept)
        raise

    value.load_state_dict(best)
    optimizer.zero_grad()
    _scale_back(value, mean, scale)
    value.provenance = _provenance(rollouts, settings, state, len(held_in), len(held_out))
    _report(state.history[state.best_epoch])
    if folder.path is not None:
        value.save_pretrained(folder.path)
        folder.finish(state)
    return value, state.history


def split_by_prompt(groups: Tensor, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out prompts with all their responses, so that no response to a prompt trained on is among those judged.

    Args:
        groups: (responses,), index of each response's prompt.
        validation_fraction: share of the prompts held out; at least one prompt is on each side, unless this is 0.
        seed: of the choice.

    Returns:
        Indices of the responses to train on, and of those held out, each in rising order.

    Raises:
        ValueError: there is only one prompt to split.
    """
    prompts = groups.unique()
    if validation_fraction and len(prompts) < 2:
        raise ValueError(f"found {len(prompts)} prompt, wanted at least 2 to hold one out; validation_fraction=0 trains without validation")
    count = max(1, min(len(prompts) - 1, round(validation_fraction * len(prompts)))) if validation_fraction else 0
    chosen = prompts[torch.from_numpy(np.random.default_rng(seed).permutation(len(prompts))[:count])]
    held_out = torch.isin(groups, chosen)
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def _update(
    value: ValueFunction,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    batch: Tensor,
    mean: Tensor,
    scale: Tensor,
    td_lambda: float,
    kernel: str = "torch",
) -> float:
    """One step of Adam on a mini-batch; returns the sum over its tokens of the squared TD error, in the unit of the reward."""
    total = int(rollouts.lengths[batch].sum())
    squares = 0.0
    optimizer.zero_grad()
    for states, rewards, lengths in _read(rollouts, batch, value, mean, scale):
        values = values_by(kernel, value, states)
        (td_loss(values, rewards, lengths, td_lambda) * (len(values) / total)).backward()
        unit = scale.to(values)
        squares += float(td_loss(values.detach() * unit, rewards * unit, lengths, td_lambda)) * len(values)
    optimizer.step()
    return squares


@torch.no_grad()
def _validate(value: ValueFunction, rollouts: Rollouts, held_out: Tensor, mean: Tensor, scale: Tensor, td_lambda: float) -> dict[str, float | None]:
    error = HeldOutError(rollouts.num_heads, mean)
    for states, rewards, lengths in _read(rollouts, held_out, value, mean, scale):
        unit, origin = scale.to(rewards), mean.to(rewards)
        error.add(value(states) * unit + origin, rewards * unit + origin, lengths, td_lambda)
    return error.summary()


def _read(rollouts: Rollouts, indices: Tensor, value: ValueFunction, mean: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """States, standardised rewards and lengths of some responses, some thousand tokens at a time, where the value function is."""
    for part in _parts(indices, rollouts.lengths):
        states, lengths, rewards = rollouts.batch(part)
        yield states.to(value.device), ((rewards.to(mean) - mean) / scale).to(value.device), lengths.to(value.device)


def _parts(indices: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    """Cut a list of responses so that no part has more than TOKENS_AT_ONCE tokens, unless it is a single response."""
    start, tokens = 0, 0
    for place, length in enumerate(lengths[indices].tolist()):
        if tokens and tokens + length > TOKENS_AT_ONCE:
            yield indices[start:place]
            start, tokens = place, 0
        tokens += length
    yield indices[start:]


def _initial_value(rollouts: Rollouts, hidden_dims: Sequence[int], seed: int) -> ValueFunction:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = ValueFunction(rollouts.hidden_size, hidden_dims, rollouts.num_heads)
    weights, biases = value.parameters_by_kind
    torch.nn.init.zeros_(weights[-1])
    torch.nn.init.zeros_(biases[-1])
    return value


def _standardisation(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each head's rewards; where they do not vary, that reward and 1."""
    # Not by the standard deviation, which for equal rewards is not 0 but the rounding of their mean.
    same = (rewards == rewards[0]).all(0)
    if same.any():
        logger.warning("all rewards of heads %s are the same: there is nothing to learn from them", same.nonzero()[:, 0].tolist())
    return torch.where(same, rewards[0], rewards.mean(0)), torch.where(same, 1, rewards.std(0, correction=0))


@torch.no_grad()
def _scale_back(value: ValueFunction, mean: Tensor, scale: Tensor) -> None:
    """Make V count in the unit of the reward."""
    weights, biases = value.parameters_by_kind
    unit, origin = scale.to(weights[-1]), mean.to(weights[-1])
    weights[-1].mul_(unit[:, None])
    biases[-1].mul_(unit).add_(origin)


def _score(entry: dict[str, Any]) -> float:
    """What the best epoch has most of: minus the Monte Carlo error, each head's in units of its flat error where that is defined."""
    explained = entry["validation_explained_variance"]
    return -entry["validation_mc_error"] if explained is None else explained


def _exhausted(state: Progress, patience: int | None) -> bool:
    return patience is not None and state.best_epoch >= 0 and state.epoch - 1 - state.best_epoch >= patience


def _report(best: dict[str, Any]) -> None:
    explained = best.get("validation_explained_variance")
    if explained is not None and explained <= 0:
        logger.warning(
            "on prompts held out the value function predicts rewards no better than their mean (explained variance %.3g): "
            "it needs more rollouts, or a reward that depends on the response",
            explained,
        )


def _check_states(rollouts: Rollouts) -> None:
    """Read everything once before training: a NaN found in epoch 50 would be found too late."""
    bad = []
    for part in _parts(torch.arange(len(rollouts)), rollouts.lengths):
        states, lengths, _ = rollouts.batch(part)
        if not (finite := states.isfinite().all(1)).all():
            bad.append(part.repeat_interleave(lengths)[~finite].unique())
    if bad:
        raise ValueError(f"hidden states must be finite, found NaN or infinite ones in responses {_some(torch.cat(bad))} of {rollouts.path}")


def _check(
    learning_rate: float,
    batch_size: int | None,
    epochs: int,
    patience: int | None,
    validation_fraction: float,
    td_lambda: float,
    checkpoint_every: int,
    dtype: torch.dtype,
    seed: int,
    kernel: str,
) -> None:
    counts = {"batch_size": batch_size, "epochs": epochs, "patience": patience, "checkpoint_every": checkpoint_every}
    for name, count in counts.items():
        if not (count is None and name in ("batch_size", "patience")) and (type(count) is not int or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1, found {count!r}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, found {seed!r}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be finite and above 0, found {learning_rate!r}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, found {validation_fraction!r}")
    if not 0 <= td_lambda <= 1:
        raise ValueError(f"td_lambda must be between 0 and 1, found {td_lambda!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, found {dtype}: smaller ones lose Adam's updates")
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(map(repr, KERNELS))}")


def _digest(rollouts: Rollouts) -> str:
    """Tells rollouts apart without reading all states: lengths, rewards and prompts of all responses, and the first and last one's states."""
    digest = sha256(str((rollouts.hidden_size, rollouts.manifest["dtype"])).encode())
    for tensor in (rollouts.lengths, rollouts.rewards, rollouts.groups):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(rollouts.batch([0, len(rollouts) - 1])[0].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _provenance(rollouts: Rollouts, settings: dict[str, Any], state: Progress, held_in: int, held_out: int) -> dict[str, Any]:
    manifest = rollouts.manifest
    return {
        "base_model": manifest.get("base_model"),
        "reward": manifest.get("reward"),
        "rollouts": {name: entry for name, entry in manifest.items() if name not in ("base_model", "reward")},
        "objective": "semi-gradient TD(lambda), reward at the last token, no discount",
        "training": settings,
        "data": {"responses": len(rollouts), "tokens": rollouts.num_tokens, "trained_on": held_in, "held_out": held_out},
        "best_epoch": state.history[state.best_epoch],
        "made_with": {"recontrol": __version__, "torch": torch.__version__},
    }


def _some(numbers: Tensor) -> str:
    return ", ".join(map(str, numbers[:8].tolist())) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
