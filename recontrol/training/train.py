"""Training a value function on rollouts of the uncontrolled model."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from recontrol.checks import renamed
from recontrol.data.online import OnlineRollouts
from recontrol.data.rollouts import Rollouts
from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.config import TrainConfig, config_of
from recontrol.training.data import Standardisation, TrainingData
from recontrol.training.distributed import Processes
from recontrol.training.fused import chosen_kernel, evaluation
from recontrol.training.loop import Learner, Loop
from recontrol.training.online import OnlineData
from recontrol.value import ValueFunction
from recontrol.version import __version__

logger = logging.getLogger(__name__)


def train(
    rollouts: Rollouts | OnlineRollouts | str | os.PathLike,
    config: TrainConfig | Sequence[int] | None = None,
    seed: int | None = None,
    *,
    validation: Rollouts | str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    log_with: Any = None,
    progress: bool = True,
    checkpoint_every: int = 1,
    **settings: Any,
) -> tuple[ValueFunction, list[dict[str, Any]]]:
    """Train V so that V(s_t) predicts the final reward of a response from the state that was read to sample its token t.

        loss = mean over tokens of (V(s_t) - target_t)^2,    target_t = V(s_{t+1}) without gradient,    target_T = r

    That is the paper's objective, "td"; `TrainConfig` says which others there are. Adam, on mini-batches of whole responses read from disk
    as they are needed; a few thousand states at a time are in memory. The order of an epoch follows from the seed and the epoch.

    V starts as the mean reward of the training data, the same for every state: the weights of the last layer are zero. Inside, rewards are
    counted in standard deviations from that mean, for each head, and the last layer is scaled back at the end: V is in the unit of the
    reward. The objective has no discount, so this changes no solution, only how Adam's learning rate relates to the unit of the reward.

    Early stopping and the choice of the best epoch go by the Monte Carlo error on prompts held out, not by the TD error, which is nearly as
    small for a V that has learned nothing.

    Started by `accelerate launch`, several processes share each mini-batch and add up their gradients: the same result within rounding.
    The first of them writes. On `OnlineRollouts` each samples the whole batch, which saves no time.

    Args:
        rollouts: what `collect` made, or its folder; or `OnlineRollouts`, which sample each mini-batch when it is trained on, write nothing,
            and give other responses to their prompts in every epoch.
        config: all settings that decide the result; or the widths of the hidden layers, `hidden_dims`, alone.
        seed: replaces that of the config.
        validation: for `OnlineRollouts`: rollouts of other prompts, by which the best epoch is chosen and rewards are standardised. None keeps
            the last weights, and standardises by the rewards of the first batch.
        out: folder for the value function (`ValueFunction.from_pretrained(out)`), `history.json` and, until the run is finished, a checkpoint.
            The same call goes on with a run that was killed, with the same result, bit for bit on the CPU with as many threads, and
            returns the result of a finished one. None writes nothing.
        device: where to train; None is a GPU if there is one, and with several processes the one that each was given.
        log_with: trackers of accelerate that get the history, such as "tensorboard", which writes into `out`.
        progress: show a progress bar.
        checkpoint_every: mini-batches between checkpoints, which is what a kill loses at most.
        **settings: fields of `TrainConfig` that replace those of `config`, for example `td_lambda=0.95`.

    Returns:
        The value function of the best epoch, on `device`, and the history: one dict an epoch with epoch (from 0), train_td_loss and,
        with validation, validation_td_loss, validation_mc_error, validation_explained_variance and validation_correlation. Losses are in
        squared units of the reward. The objective "preference" has train_preference_loss, validation_preference_loss, by which the
        best epoch is chosen, and validation_preference_accuracy instead, and the above only with regression; its V is in nats, and
        without regression only differences of it mean something. "released" has train_released_loss.

    Raises:
        TypeError: a setting that `TrainConfig` does not have.
        ValueError: no rollouts, states or rewards that are not finite (the responses are named), a single prompt with `validation_fraction`
            above 0, no pairs for "preference", a setting out of its range, validation rollouts of another model or reward, or an `out`
            folder of another run.
        RuntimeError: `kernel` is one that cannot run here; the message says why. Or another run is writing into `out`.
        ImportError: `log_with` names a tracker that is not installed.
        FloatingPointError: training diverged.
        OSError: the disk is full; the message names the file, and the checkpoint before it stays.

    Source: Kong et al. 2024, section 4.2 and appendix (training of the value function).
    """
    config = config_of(config, seed, settings)
    if type(checkpoint_every) is not int or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an integer of at least 1, found {checkpoint_every!r}")
    processes = Processes(log_with, out)
    with _opened(rollouts, validation, config, processes) as data:
        objective = config.new_objective()
        objective.bind(data)
        units = len(objective.units(0))
        batch_size = data.batch_size(config.batch_size, units)
        value = initial_value(data, config).to(device=processes.device(device), dtype=getattr(torch, config.dtype))
        config = dataclasses.replace(config, batch_size=batch_size, kernel=_kernel(config, value, data))
        decisive = {**config.record(), **data.settings(objective.labels)}
        folder = RunFolder(out, decisive, write=processes.is_main)
        if folder.path is not None and folder.finished:
            folder.clear()
            return ValueFunction.from_pretrained(folder.path, device=value.device), folder.history
        learner = Learner(value, config, evaluation(value, config.kernel, config.compute_dtype), processes)
        state, best = folder.load(value.state_dict(), learner.optimizer, learner.average_state)
        if state == Progress():
            data.check()
        processes.start_tracking(decisive)
        try:
            best = Loop(config, -(-units // batch_size), checkpoint_every, progress).run(learner, objective, folder, state, best)
        finally:
            processes.stop_tracking()
    value.load_state_dict(best)
    learner.optimizer.zero_grad()
    if config.normalise_rewards:
        value.reward_mean, value.reward_std = tuple(objective.standardisation.mean.tolist()), tuple(objective.standardisation.scale.tolist())
    else:
        scale_back(value, objective.standardisation)
    value.provenance = {**data.provenance(), "objective": objective.describe(), "training": decisive, **_outcome(state)}
    if processes.is_main:
        for doubt in objective.doubts(value.provenance["best_epoch"]):
            logger.warning("%s", doubt)
        if folder.path is not None:
            value.save_pretrained(folder.path)
            folder.finish(state)
    processes.wait()
    return value, state.history


def train_online(
    online: OnlineRollouts, hidden_dims: Sequence[int] = (4096,), seed: int = 0, *, passes: int = 1, **options: Any
) -> tuple[ValueFunction, list[dict[str, Any]]]:
    """The former name of `train(online, ...)`, of which it differs in two defaults: one pass, and autograd.

    Args:
        online: where batches come from.
        hidden_dims: widths of the hidden layers.
        seed: of the first weights and the order of batches within a pass.
        passes: over the prompts, at most: `epochs` of `train`.
        **options: other arguments and settings of `train`.

    Returns:
        As `train`.

    Raises:
        TypeError, ValueError, FloatingPointError, OSError: as `train`.
    """
    renamed("train_online(online, passes=n)", "train(online, epochs=n)")
    return train(online, hidden_dims, seed, **{"epochs": passes, "kernel": "torch", **options})


@contextlib.contextmanager
def _opened(
    rollouts: Rollouts | OnlineRollouts | str | os.PathLike, validation: Rollouts | str | os.PathLike | None, config: TrainConfig, processes: Processes
) -> Iterator[TrainingData]:
    """What to train on; inside the block, the model of `OnlineRollouts` is ready."""
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "normalise_rewards": config.normalise_rewards}
    if isinstance(rollouts, OnlineRollouts):
        if not config.new_objective().online:
            raise ValueError(f"OnlineRollouts give responses one by one, and the objective {config.objective!r} needs pairs: collect them, and train on those")
        judged = validation if isinstance(validation, Rollouts) or validation is None else Rollouts(validation)
        with rollouts.opened() as make:
            yield OnlineData(rollouts, make, judged, processes, **options)
        return
    if validation is not None:
        raise ValueError("validation is for OnlineRollouts; of stored rollouts a share of the prompts is held out, validation_fraction")
    stored = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    yield TrainingData(stored, processes, validation_fraction=config.validation_fraction, seed=config.seed, **options)


def _kernel(config: TrainConfig, value: ValueFunction, data: TrainingData) -> Any:
    """The kernel that "auto" stands for, or the one asked for if it can run; a low precision has only one."""
    states = torch.empty(0, data.hidden_size, dtype=data.states_dtype, device=value.device)
    return "torch" if config.compute_dtype else chosen_kernel(config.kernel, value, states)


def _outcome(state: Progress) -> dict[str, Any]:
    """What the provenance says of the run itself."""
    made_with = {"recontrol": __version__, "torch": torch.__version__}
    return {"best_epoch": state.history[state.best_epoch], "history": list(state.history), "made_with": made_with}


def initial_value(data: TrainingData, config: TrainConfig) -> ValueFunction:
    """A value function that is 0, the mean of standardised rewards, for every state; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        value = ValueFunction(data.hidden_size, config.hidden_dims, data.num_heads)
    weights, biases = value.parameters_by_kind
    torch.nn.init.zeros_(weights[-1])
    torch.nn.init.zeros_(biases[-1])
    return value


@torch.no_grad()
def scale_back(value: ValueFunction, standardisation: Standardisation) -> None:
    """Make V count in the unit of the reward, in place."""
    weights, biases = value.parameters_by_kind
    unit, origin = standardisation.scale.to(weights[-1]), standardisation.mean.to(weights[-1])
    weights[-1].mul_(unit[:, None])
    biases[-1].mul_(unit).add_(origin)
