"""Training a value function on rollouts of the uncontrolled model."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from recontrol.data.rollouts import Rollouts
from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.data import Standardisation, check_rewards, check_states, digest, split_by_prompt
from recontrol.training.distributed import Processes
from recontrol.training.fused import KERNELS, chosen_kernel, values_by
from recontrol.training.initial import initial_value, scale_back
from recontrol.training.loop import Learner, Loop
from recontrol.training.mixed_precision import low_precision_values
from recontrol.training.objectives import Objective
from recontrol.training.optimisation import Optimisation
from recontrol.training.pairs import preference_pairs
from recontrol.training.tasks import PreferenceTask, Task, TokenTask
from recontrol.value import ValueFunction
from recontrol.version import __version__

logger = logging.getLogger(__name__)

# The paper's batch; small data get smaller ones, or one pass over them would be a handful of updates.
LARGEST_BATCH = 512
MINIBATCHES = 20


def train(
    rollouts: Rollouts | str | os.PathLike,
    hidden_dims: Sequence[int] = (4096,),
    seed: int = 0,
    *,
    out: str | os.PathLike | None = None,
    objective: str | None = None,
    td_lambda: float = 0.0,
    preference_regression: float = 0.0,
    preference_regulariser: float = 0.0,
    normalise_rewards: bool = False,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    schedule: str = "constant",
    max_gradient_norm: float | None = None,
    ema_decay: float | None = None,
    batch_size: int | None = None,
    epochs: int = 100,
    patience: int | None = 10,
    validation_fraction: float = 0.1,
    checkpoint_every: int = 1,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kernel: str = "auto",
    log_with: Any = None,
    progress: bool = True,
) -> tuple[ValueFunction, list[dict[str, Any]]]:
    """Train V so that V(s_t) predicts the final reward of a response from the state that was read to sample its token t.

        loss = mean over tokens of (V(s_t) - target_t)^2,    target_t = V(s_{t+1}) without gradient,    target_T = r

    That is the paper's objective, "td". Adam, on mini-batches of whole responses read from disk as they are needed; one temporary
    copy of a few thousand states is all that is in memory. Each epoch takes the responses in an order that follows from the seed
    and the epoch.

    V starts as the mean reward of the training data, the same for every state: the weights of the last layer are zero, its bias is
    that mean. Inside, rewards are counted in standard deviations from it, for each head, and the last layer is scaled
    back at the end. The objective has no discount, so this changes no solution, only how Adam's learning rate relates
    to the unit of the reward; V is in the unit of the reward.

    Early stopping and the choice of the best epoch go by the Monte Carlo error on prompts held out, not by the TD error,
    which is nearly as small for a V that has learned nothing (see `HeldOutError`).

    Started by `accelerate launch`, several processes share each mini-batch and add up their gradients: the same result within rounding.
    The first of them writes.

    Args:
        rollouts: what `collect` made, or its folder.
        hidden_dims: widths of the hidden layers; `(4096,)` is the paper's "two linear layers".
        seed: of the first weights, the split and the order of responses, 0 or more.
        out: folder for the value function (`ValueFunction.from_pretrained(out)`), `history.json` and, until the run is
            finished, a checkpoint. The same call takes up a run that was killed, with the same result, bit for bit on the CPU with as many
            threads, and returns the result of a finished one. None writes nothing.
        objective: "td" is the paper's; "td-lambda" mixes the final reward into its targets; "mc" is regression of the final
            reward at every token; "preference" is -log sigmoid(V(chosen) - V(rejected)) on last tokens of pairs of responses to a
            prompt (see `preference_pairs`), after which V is a score in nats whose differences alone mean something;
            "reference" is the loss of the released code with its mistakes, for comparison only (see `reference_loss`). None is
            "td", or "td-lambda" where `td_lambda` is above 0.
        td_lambda: for "td-lambda": lambda of `bellman_targets`, up to 1, which is "mc". Values such as 0.95 need far fewer epochs on
            small data than "td", which is 0.
        preference_regression: for "preference": weight of the TD(lambda) loss, in the unit of the reward, over all tokens of the
            responses that the model itself generated, or of all responses where there are no such.
        preference_regulariser: for "preference": weight of the mean of (V(generated) - V(chosen))^2 on last tokens. With both weights
            1 the three terms are those of Pref-CTRL (Ashrafi et al. 2026).
        normalise_rewards: leave V in standard deviations from the mean reward of the training data, and store these statistics
            in it (`ValueFunction.to_reward`), instead of scaling its last layer back.
        learning_rate: of Adam, the largest of the schedule.
        weight_decay: of AdamW; 0 is Adam.
        warmup_steps: mini-batches over which the learning rate rises.
        schedule: of the learning rate after that: "constant", or "cosine", down to 0 at the last of `epochs`.
        max_gradient_norm: gradients, of the loss in standard deviations of the reward, are cut to this norm; None leaves them.
        ema_decay: keep an exponential moving average of the weights with this decay, such as 0.99, for validation and as the result.
        batch_size: responses ("preference": prompts) in a mini-batch at most; None is the paper's 512, or fewer, so that an epoch has
            20 mini-batches. Several processes share it.
        epochs: passes over the training data at most.
        patience: stop after so many epochs without a better one; None never stops early.
        validation_fraction: share of the prompts held out, at least one prompt; 0 trains on all, without early stopping,
            and keeps the last weights.
        checkpoint_every: mini-batches between checkpoints, which is what a kill loses at most.
        dtype: of the weights, torch.float32 or torch.float64.
        compute_dtype: of the products of the hidden layers in training, torch.bfloat16, or None for `dtype`; weights, the optimiser and
            validation keep `dtype`.
        device: where to train; None is a GPU if there is one, and with several processes the one that was dealt to each.
        kernel: what computes V and its gradient in training: "torch" is autograd; "closed-form" and "triton" keep a mask instead of the
            activations, for two linear layers: the first in PyTorch with one head, the second as fused kernels in float32 (see
            `recontrol.training.fused`). "auto" is "closed-form" on a CPU where it can be and pays, else "torch": the fused
            kernels have not been measured on a GPU. They round differently, so a run goes on only with its own. Validation is by V itself.
        log_with: trackers of accelerate that get the history, such as "tensorboard", which writes into `out`.
        progress: show a progress bar.

    Returns:
        The value function of the best epoch, on `device`, and the history: one dict an epoch with epoch (from 0), train_td_loss and,
        with validation, validation_td_loss, validation_mc_error, validation_explained_variance and validation_correlation
        (see `HeldOutError.summary`). Losses are in squared units of the reward. The objective "preference" has
        train_preference_loss, validation_preference_loss, by which the best epoch is chosen, and validation_preference_accuracy
        instead, and the above only with regression; "reference" has train_reference_loss.

    Raises:
        ValueError: no rollouts, states or rewards that are not finite (the responses are named), a single prompt with
            `validation_fraction` above 0, no pairs for "preference", a setting out of its range, or an `out` folder of another run.
        RuntimeError: `kernel` is one that cannot run here; the message says why. Or another run is writing into `out`.
        ImportError: `log_with` names a tracker that is not installed.
        FloatingPointError: training diverged.
        OSError: the disk is full; the message names the file, and the checkpoint before it stays.

    Source: Kong et al. 2024, section 4.2 and appendix (training of the value function).
    """
    rollouts = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    aim = Objective(objective, td_lambda, preference_regression, preference_regulariser)
    optimisation = Optimisation(learning_rate, weight_decay, warmup_steps, schedule, max_gradient_norm, ema_decay)
    _check(hidden_dims, batch_size, epochs, patience, validation_fraction, checkpoint_every, dtype, compute_dtype, seed, kernel)
    if normalise_rewards and not aim.predicts_reward:
        raise ValueError("normalise_rewards has no meaning for the objective 'preference' without preference_regression: V is no prediction of the reward")
    if not len(rollouts):
        raise ValueError(f"{rollouts.path} has no responses to train on")
    check_rewards(rollouts)
    processes = Processes(log_with, out)
    place = processes.device(device)
    held_in, held_out = split_by_prompt(rollouts.groups, validation_fraction, seed)
    task, standardisation = _task(rollouts, aim, held_in, held_out, dtype, normalise_rewards, processes)
    batch_size = batch_size or max(1, min(LARGEST_BATCH, len(task.units) // MINIBATCHES))
    value = initial_value(rollouts.hidden_size, hidden_dims, rollouts.num_heads, seed).to(device=place, dtype=dtype)
    if compute_dtype in (None, dtype):
        compute_dtype = None
        kernel = chosen_kernel(kernel, value, torch.empty(0, rollouts.hidden_size, dtype=getattr(torch, rollouts.manifest["dtype"]), device=place))
    else:
        kernel = "torch"
    # Labels of chosen and rejected responses are no part of the rewards.
    tables = (task.pairs.margin, task.held_out.margin) if isinstance(task, PreferenceTask) else ()
    settings = {
        "rollouts": digest(rollouts, *tables),
        "hidden_dims": list(hidden_dims),
        "seed": seed,
        "objective": aim.name,
        **{name: weight for name, weight in asdict(aim).items() if name != "name"},
        "normalise_rewards": normalise_rewards,
        **optimisation.settings(),
        "batch_size": batch_size,
        "epochs": epochs,
        "patience": patience,
        "validation_fraction": validation_fraction,
        "dtype": _name(dtype),
        "compute_dtype": None if compute_dtype is None else _name(compute_dtype),
        "kernel": kernel,
    }
    folder = RunFolder(out, settings, write=processes.is_main)
    if folder.path is not None and folder.finished:
        folder.clear()
        return ValueFunction.from_pretrained(folder.path, device=place), folder.history
    learner = Learner(value, optimisation, _evaluation(value, kernel, compute_dtype), processes)
    state, best = folder.load(value.state_dict(), learner.optimizer, learner.average_state)
    if state == Progress():
        check_states(rollouts)

    loop = Loop(epochs, -(-len(task.units) // batch_size), seed, patience, checkpoint_every, progress)
    processes.start_tracking(settings)
    try:
        best = loop.run(learner, task, folder, state, best)
    finally:
        processes.stop_tracking()

    value.load_state_dict(best)
    learner.optimizer.zero_grad()
    if normalise_rewards:
        value.reward_mean, value.reward_std = tuple(standardisation.mean.tolist()), tuple(standardisation.scale.tolist())
    else:
        scale_back(value, standardisation)
    value.provenance = _provenance(rollouts, aim, settings, state, len(held_in), len(held_out))
    if processes.is_main:
        _report(state.history[state.best_epoch])
        if folder.path is not None:
            value.save_pretrained(folder.path)
            folder.finish(state)
    processes.wait()
    return value, state.history


def _task(
    rollouts: Rollouts, objective: Objective, held_in: Tensor, held_out: Tensor, dtype: torch.dtype, normalise_rewards: bool, processes: Processes
) -> tuple[Task, Standardisation]:
    """The objective on the data, and how rewards, and V with them, are counted inside."""
    rewards = rollouts.rewards.to(dtype)
    if not objective.pairs:
        standardisation = Standardisation.of(rewards[held_in])
        return TokenTask(rollouts, objective, standardisation, held_in, held_out, processes), standardisation
    pairs = preference_pairs(rollouts)
    if objective.preference_regulariser and not len(pairs.anchor):
        raise ValueError(
            f"preference_regulariser draws the model's own responses to the chosen ones, and {rollouts.path} has no responses to prompts with pairs "
            "beside those labelled chosen and rejected"
        )
    trained, judged = pairs.of(rollouts.groups[held_in]), pairs.of(rollouts.groups[held_out])
    for which, found, wanted in (("trained on", trained, True), ("held out", judged, len(held_out) > 0)):
        if wanted and not len(found.margin):
            raise ValueError(f"the prompts {which} have no pair; use another seed or validation_fraction, or more rollouts")
    regressed = torch.zeros(len(rollouts), dtype=torch.bool)
    standardisation = Standardisation.none(rollouts.num_heads, dtype)
    if objective.preference_regression:
        regressed = pairs.generated if pairs.generated.any() else ~pairs.generated
        if not regressed[held_in].any():
            raise ValueError("the prompts trained on have no response for preference_regression; use another seed or validation_fraction, or more rollouts")
        standardisation = Standardisation.of(rewards[held_in[regressed[held_in]]])
    unit = torch.ones_like(standardisation.scale) if normalise_rewards else standardisation.scale
    return PreferenceTask(rollouts, objective, standardisation, unit, trained, judged, regressed, processes), standardisation


def _evaluation(value: ValueFunction, kernel: str, compute_dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """V of states on any device, with a gradient for its weights."""

    def values(states: Tensor) -> Tensor:
        states = states.to(value.device)
        return values_by(kernel, value, states) if compute_dtype is None else low_precision_values(value, states, compute_dtype)

    return values


def _report(best: dict[str, Any]) -> None:
    explained, accuracy = best.get("validation_explained_variance"), best.get("validation_preference_accuracy")
    if explained is not None and explained <= 0:
        logger.warning(
            "on prompts held out the value function predicts rewards no better than their mean (explained variance %.3g): "
            "it needs more rollouts, or a reward that depends on the response",
            explained,
        )
    if accuracy is not None and accuracy <= 0.5:
        logger.warning("on prompts held out the value function orders pairs no better than a coin (accuracy %.3g): it needs more pairs", accuracy)


def _check(
    hidden_dims: Sequence[int],
    batch_size: int | None,
    epochs: int,
    patience: int | None,
    validation_fraction: float,
    checkpoint_every: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    seed: int,
    kernel: str,
) -> None:
    if not isinstance(hidden_dims, Sequence) or isinstance(hidden_dims, str):
        raise ValueError(f"hidden_dims must be a sequence of positive integers such as (4096,), found {hidden_dims!r}")
    counts = {"batch_size": batch_size, "epochs": epochs, "patience": patience, "checkpoint_every": checkpoint_every}
    for name, count in counts.items():
        if not (count is None and name in ("batch_size", "patience")) and (type(count) is not int or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1, found {count!r}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, found {seed!r}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, found {validation_fraction!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, found {dtype}: smaller ones lose Adam's updates")
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(map(repr, ('auto', *KERNELS)))}")
    if compute_dtype not in (None, dtype, torch.bfloat16):
        raise ValueError(f"compute_dtype must be torch.bfloat16, or None for that of the weights, found {compute_dtype}")
    if compute_dtype not in (None, dtype) and kernel not in ("auto", "torch"):
        raise ValueError(f"compute_dtype is for kernel 'torch', found it with {kernel!r}")


def _provenance(rollouts: Rollouts, objective: Objective, settings: dict[str, Any], state: Progress, held_in: int, held_out: int) -> dict[str, Any]:
    manifest = rollouts.manifest
    return {
        "base_model": manifest.get("base_model"),
        "reward": manifest.get("reward"),
        "rollouts": {name: entry for name, entry in manifest.items() if name not in ("base_model", "reward")},
        "objective": objective.describe(),
        "training": settings,
        "data": {"responses": len(rollouts), "tokens": rollouts.num_tokens, "trained_on": held_in, "held_out": held_out},
        "best_epoch": state.history[state.best_epoch],
        "history": list(state.history),
        "made_with": {"recontrol": __version__, "torch": torch.__version__},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
