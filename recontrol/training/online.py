"""Training a value function while rollouts are sampled, which are trained on once and not kept."""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from recontrol.data.batches import MemoryRollouts, ScoredResponses
from recontrol.data.online import OnlineRollouts
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.fingerprint import difference
from recontrol.training.checkpoint import Progress, RunFolder
from recontrol.training.data import Standardisation, check_rewards, digest
from recontrol.training.distributed import Processes
from recontrol.training.initial import initial_value, scale_back
from recontrol.training.loop import Learner, Loop
from recontrol.training.objectives import Objective
from recontrol.training.optimisation import Optimisation
from recontrol.training.tasks import TokenTask, Values, held_out_error
from recontrol.value import ValueFunction
from recontrol.version import __version__


def train_online(
    online: OnlineRollouts,
    hidden_dims: Sequence[int] = (4096,),
    seed: int = 0,
    *,
    validation: Rollouts | str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    objective: str | None = None,
    td_lambda: float = 0.0,
    learning_rate: float = 1e-4,
    passes: int = 1,
    patience: int | None = 10,
    checkpoint_every: int = 1,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[ValueFunction, list[dict[str, Any]]]:
    """Train V as `train` does, on batches that the model samples for each step; no state touches the disk.

    A mini-batch is a batch of `online`. A pass over the prompts is what an epoch is to `train`, except that every pass samples new
    responses, so that V never sees a response twice. A batch follows from its number alone: a run that was killed goes on
    from its last checkpoint with the same result, bit for bit on the CPU.

    Several processes give the same result within rounding, as in `train`, but each samples the whole batch: that saves no time.

    Rewards are counted in standard deviations inside, by the rewards of `validation`, or without it by those of the first batch, which is
    sampled once more for that; V is in the unit of the reward at the end.

    Args:
        online: where batches come from.
        hidden_dims: widths of the hidden layers.
        seed: of the first weights and the order of batches within a pass.
        validation: rollouts of other prompts, by which the best pass is chosen as in `train`; None keeps the last weights.
        out: folder for the value function, its history and, until the run is finished, a checkpoint; None writes nothing.
        objective: "td", "td-lambda", "mc" or "reference", as for `train`; None is "td", or "td-lambda" where `td_lambda` is above 0.
        td_lambda: for "td-lambda".
        learning_rate: of Adam.
        passes: over the prompts, at most.
        patience: stop after so many passes without a better one; None never stops early.
        checkpoint_every: mini-batches between checkpoints.
        device: where V is trained; None is a GPU if there is one.
        progress: show a progress bar.

    Returns:
        The value function and the history, one dict a pass, as from `train`.

    Raises:
        ValueError: validation rollouts of another model, width or number of rewards, a setting out of its range, an objective that
            needs pairs, or an `out` folder of another run.
        FloatingPointError: training diverged.
        OSError: the disk is full; the message names the file, and the checkpoint before it stays.

    Source: Kong et al. 2024, section 4.2 (training of the value function).
    """
    aim = Objective(objective, td_lambda)
    if aim.pairs:
        raise ValueError("train_online takes responses one by one, found the objective 'preference', which needs pairs: collect them, and use train")
    for name, count in {"passes": passes, "patience": patience, "checkpoint_every": checkpoint_every}.items():
        if not (count is None and name == "patience") and (type(count) is not int or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1, found {count!r}")
    judged = validation if isinstance(validation, Rollouts) or validation is None else Rollouts(validation)
    if judged is not None:
        check_rewards(judged)
        _check_validation(online, judged)
    optimisation, processes = Optimisation(learning_rate), Processes()
    with online.opened() as make:
        # How many heads there are shows in the rewards only.
        rewards = make(0).batch().rewards if judged is None else judged.rewards
        if not len(rewards):
            raise ValueError("there are no rewards to begin with: stop strings cut the responses of the first batch to nothing, or validation has none")
        standardisation = Standardisation.of(rewards)
        settings = {
            "online": {name: entry for name, entry in online.settings.items() if name not in ("base_model", "made_with", "tokenizer")},
            "validation": None if judged is None else digest(judged),
            "hidden_dims": list(hidden_dims),
            "seed": seed,
            "objective": aim.name,
            "td_lambda": aim.td_lambda,
            **optimisation.settings(),
            "passes": passes,
            "patience": patience,
        }
        value = initial_value(online.hidden_size, hidden_dims, rewards.shape[1], seed).to(processes.device(device))
        folder = RunFolder(out, settings, write=processes.is_main)
        if folder.path is not None and folder.finished:
            folder.clear()
            return ValueFunction.from_pretrained(folder.path, device=value.device), folder.history
        learner = Learner(value, optimisation, lambda states: value(states.to(value.device)), processes)
        state, best = folder.load(value.state_dict(), learner.optimizer)
        task = OnlineTask(make, len(online), state, aim, standardisation, judged, processes)
        best = Loop(passes, len(online), seed, patience, checkpoint_every, progress).run(learner, task, folder, state, best)
    value.load_state_dict(best)
    learner.optimizer.zero_grad()
    scale_back(value, standardisation)
    value.provenance = {
        "base_model": online.settings["base_model"],
        "reward": online.settings["reward"],
        "rollouts": {name: entry for name, entry in online.settings.items() if name not in ("base_model", "reward")},
        "objective": aim.describe(),
        "training": settings,
        "best_epoch": state.history[state.best_epoch],
        "history": list(state.history),
        "made_with": {"recontrol": __version__, "torch": torch.__version__},
    }
    if processes.is_main and folder.path is not None:
        value.save_pretrained(folder.path)
        folder.finish(state)
    processes.wait()
    return value, state.history


class OnlineTask:
    """A `Task` whose units are the numbers of the batches of a pass; each is sampled when it is trained on.

    Args:
        make: from the number of a batch to its responses.
        batches: of a pass.
        state: of the run, which knows the pass.
        objective: on the tokens of single responses.
        standardisation: of the rewards.
        validation: what V is judged on, or None.
        processes: the processes that share a batch.
    """

    def __init__(
        self,
        make: Callable[[int], ScoredResponses],
        batches: int,
        state: Progress,
        objective: Objective,
        standardisation: Standardisation,
        validation: Rollouts | None,
        processes: Processes,
    ):
        self.make, self.state, self.objective, self.standardisation = make, state, objective, standardisation
        self.validation, self.processes = validation, processes
        self.units = torch.arange(batches)
        self.loss_name = "train_reference_loss" if objective.name == "reference" else "train_td_loss"

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """As `Task.backward`, on one batch sampled for this pass."""
        (number,) = batch.tolist()
        scored = self.make(self.state.epoch * len(self.units) + number)
        if not scored.records:
            return 0.0, 1
        # What a task reads of rollouts, a batch in memory has too.
        rollouts = cast(Rollouts, MemoryRollouts(scored.batch()))
        responses = torch.arange(len(rollouts.lengths))
        task = TokenTask(rollouts, self.objective, self.standardisation, responses, responses[:0], self.processes)
        return task.backward(values_of, responses)

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """As `Task.validate`: the scores of `HeldOutError` on the validation rollouts."""
        if self.validation is None:
            return {}
        everything = torch.arange(len(self.validation))
        return held_out_error(values_of, self.validation, everything, self.standardisation, self.objective.td_lambda, self.processes)


def _check_validation(online: OnlineRollouts, judged: Rollouts) -> None:
    """Refuse validation rollouts whose states or rewards are not those of the batches."""
    if judged.hidden_size != online.hidden_size:
        raise ValueError(f"{judged.path} has states of width {judged.hidden_size}, those of the model have {online.hidden_size}")
    recorded = judged.manifest.get("base_model")
    if recorded and (other := difference(recorded, online.model)):
        raise ValueError(f"{judged.path} holds rollouts of another model: {other}")
    for name in ("reward", "tokenizer_sha256"):
        found, wanted = judged.manifest.get(name), online.settings[name]
        if found not in (None, wanted):
            raise ValueError(f"{judged.path} has another {name} than what is trained on: found {found!r}, wanted {wanted!r}")
