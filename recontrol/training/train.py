"""Training a value function on rollouts of the uncontrolled model."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any, cast

import torch

from recontrol.ambient import carried, shielded
from recontrol.checks import renamed
from recontrol.data.online import OnlineRollouts
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.fingerprint import difference
from recontrol.training.config import TrainConfig, config_of
from recontrol.training.data import LARGEST_BATCH, MINIBATCHES, Make, Standardisation, TrainingData, check_rewards, check_states, origin, stored
from recontrol.training.distributed import Processes
from recontrol.training.fused import chosen_kernel, evaluation
from recontrol.training.loop import Learner, Progress, RunFolder, run
from recontrol.value import ValueFunction
from recontrol.version import __version__

logger = logging.getLogger(__name__)

Stored = Rollouts | str | os.PathLike
Trained = tuple[ValueFunction, list[dict[str, Any]]]


def train(
    rollouts: Stored | OnlineRollouts,
    config: TrainConfig | Sequence[int] | None = None,
    seed: int | None = None,
    *,
    validation: Stored | None = None,
    out: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    log_with: Any = None,
    progress: bool = True,
    checkpoint_every: int = 1,
    **settings: Any,
) -> Trained:
    """Train V so that V(s_t) predicts the final reward of a response from the state that was read to sample its token t.

        loss = mean over tokens of (V(s_t) - target_t)^2,    target_t = V(s_{t+1}) without gradient,    target_T = r

    That is the paper's objective, "td"; `TrainConfig` has others. The best epoch is that of the least Monte Carlo error on prompts held out, not of the
    least TD error, which is nearly as small for a V that has learned nothing. Processes of `accelerate launch` share each mini-batch.

    Args:
        rollouts: what `collect` made, or its folder; or `OnlineRollouts`, which sample other responses in every epoch and write nothing.
        config: all settings that decide the result; or the widths of the hidden layers, `hidden_dims`, alone.
        seed: replaces that of the config.
        validation: for `OnlineRollouts`: rollouts of other prompts, for the choice of the epoch and the unit of V; else the last one and the first batch.
        out: folder for the value function, `history.json` and, until the end, a checkpoint, from which the same call goes on, with the same result,
            bit for bit on the CPU with as many threads; it returns the result of a finished run. None writes nothing.
        device: where to train; None is a GPU if there is one, and with several processes the one that each was given.
        log_with: trackers of accelerate that get the history, such as "tensorboard", which writes into `out`.
        progress: show a progress bar.
        checkpoint_every: mini-batches between checkpoints, which is what a kill loses at most.
        **settings: fields of `TrainConfig` that replace those of `config`, for example `td_lambda=0.95`.

    Returns the value function of the best epoch, on `device`, and the history, one dict an epoch: epoch (from 0), train_td_loss (or train_released_loss)
    and, with validation, validation_td_loss, validation_mc_error, validation_explained_variance and validation_correlation, losses in squared units of
    the reward; "preference" has train_preference_loss, validation_preference_loss (nats) and validation_preference_accuracy. Settings or rollouts that
    cannot be are a TypeError or ValueError, a kernel that cannot run here a RuntimeError, and divergence a FloatingPointError; the checkpoint before it
    stays. Source: Kong et al. 2024, section 4.2 and appendix (training of the value function).
    """
    config = config_of(config, seed, settings)
    if type(checkpoint_every) is not int or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an integer of at least 1, found {checkpoint_every!r}")
    processes, objective = Processes(log_with, out), config.new_objective()
    opened = rollouts.opened() if isinstance(rollouts, OnlineRollouts) else contextlib.nullcontext()
    # A model that is sampled from runs as the caller has set torch, all else as if nothing were set.
    with opened as sampled, contextlib.nullcontext(sampled and carried(sampled)) as make, shielded(gradients=True):
        data = _training_data(rollouts, make, validation, config, processes)
        objective.bind(data)
        units = len(objective.units)
        batch_size = config.batch_size or (max(1, min(LARGEST_BATCH, units // MINIBATCHES)) if data.online is None else 1)
        value = initial_value(data, config).to(device=processes.device(device), dtype=getattr(torch, config.dtype))
        # A low precision has only one kernel.
        kernel: Any = "torch" if config.compute_dtype else chosen_kernel(config.kernel, value, data.no_states.to(value.device))
        config = dataclasses.replace(config, batch_size=batch_size, kernel=kernel)
        decisive = {**config.record(), **data.settings(objective.labels)}
        folder = RunFolder(out, decisive, write=processes.is_main)
        if folder.path is not None and folder.finished:
            return ValueFunction.from_pretrained(folder.path, device=value.device), folder.history
        learner = Learner(value, config, evaluation(value, config.kernel, config.compute_dtype), processes)
        state, best = folder.load(*learner.state())
        if state == Progress() and data.rollouts is not None:
            check_states(data.rollouts)
        with processes.tracking(decisive):
            best = run(learner, objective, folder, state, best, -(-units // batch_size), checkpoint_every, progress)
    value.load_state_dict(best)
    learner.optimizer.zero_grad()
    if config.normalise_rewards:
        value.reward_mean, value.reward_std = tuple(objective.standardisation.mean.tolist()), tuple(objective.standardisation.scale.tolist())
    else:
        scale_back(value, objective.standardisation)
    value.provenance = {**data.provenance, "objective": objective.description.format(objective), "training": decisive}
    value.provenance |= {"best_epoch": state.history[state.best_epoch], "history": list(state.history)}
    value.provenance["made_with"] = {"recontrol": __version__, "torch": torch.__version__}
    if processes.is_main:
        for doubt in objective.doubts(value.provenance["best_epoch"]):
            logger.warning("%s", doubt)
        if folder.path is not None:
            value.save_pretrained(folder.path)
            folder.finish(state)
    # Until the files are whole.
    processes.gathered(None)
    return value, state.history


def train_online(online: OnlineRollouts, hidden_dims: Sequence[int] = (4096,), seed: int = 0, *, passes: int = 1, **options: Any) -> Trained:
    """The former name of `train(online, ...)`, of which it differs in two defaults: one pass, and autograd.

    Args:
        online: where batches come from.
        hidden_dims: widths of the hidden layers.
        seed: of the first weights and the order of batches within a pass.
        passes: over the prompts, at most: `epochs` of `train`.
        **options: other arguments and settings of `train`.
    """
    renamed("train_online(online, passes=n)", "train(online, epochs=n)")
    return train(online, hidden_dims, seed, **{"epochs": passes, "kernel": "torch", **options})


def _training_data(rollouts: Stored | OnlineRollouts, make: Make | None, validation: Stored | None, config: TrainConfig, processes: Processes) -> TrainingData:
    """What to train on; of `OnlineRollouts` batches are the mini-batches, and rewards are standardised by those of the validation, or of the first batch."""
    source: Any = Rollouts(rollouts) if isinstance(rollouts, str | os.PathLike) else rollouts
    judged = Rollouts(validation) if isinstance(validation, str | os.PathLike) else validation
    dtype = getattr(torch, config.dtype)
    if make is None:
        if judged is not None:
            raise ValueError("validation is for OnlineRollouts; of stored rollouts a share of the prompts is held out, validation_fraction")
        return stored(source, processes, config.validation_fraction, config.seed, dtype, config.normalise_rewards)
    online: OnlineRollouts = source
    if not config.new_objective().online:
        raise ValueError(f"OnlineRollouts give responses one by one, and the objective {config.objective!r} needs pairs: collect them, and train on those")
    if config.batch_size is not None:
        raise ValueError(f"a mini-batch is a batch of OnlineRollouts, whose batch_size says how many prompts it has; found {config.batch_size!r} here too")
    if judged is not None:
        check_rewards(judged)
        recorded = judged.manifest.get("base_model")
        if recorded and (other := difference(recorded, online.model)):
            raise ValueError(f"{judged.path} holds rollouts of another model: {other}")
        for name in ("hidden_size", "reward", "tokenizer_sha256"):
            wanted = {"hidden_size": online.hidden_size, **online.settings}[name]
            if (found := judged.manifest.get(name)) not in (None, wanted):
                raise ValueError(f"{judged.path} has another {name} than what is trained on: found {found!r}, wanted {wanted!r}")
    # How many heads there are shows in the rewards only.
    rewards = (make(0).batch() if judged is None else judged).rewards.to(dtype)
    if not len(rewards):
        raise ValueError("there are no rewards to begin with: stop strings cut the responses of the first batch to nothing, or validation has none")
    held_in, held_out = torch.arange(len(online)), torch.arange(0 if judged is None else len(judged))
    provenance, no_states = origin(online.settings), torch.empty(0, online.hidden_size, dtype=online.dtype)
    where = processes, cast(Rollouts, judged), held_in, held_out, rewards
    return TrainingData(*where, config.normalise_rewards, no_states, provenance, online.settings, make)


def initial_value(data: TrainingData, config: TrainConfig) -> ValueFunction:
    """A value function that is 0, the mean of standardised rewards, for every state; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        value = ValueFunction(data.no_states.shape[1], config.hidden_dims, data.rewards.shape[1])
    for parameters in value.parameters_by_kind:
        torch.nn.init.zeros_(parameters[-1])
    return value


@torch.no_grad()
def scale_back(value: ValueFunction, standardisation: Standardisation) -> None:
    """Make V count in the unit of the reward, in place."""
    weights, biases = value.parameters_by_kind
    unit, origin = standardisation.scale.to(weights[-1]), standardisation.mean.to(weights[-1])
    weights[-1].mul_(unit[:, None])
    biases[-1].mul_(unit).add_(origin)
