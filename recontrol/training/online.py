"""Training on rollouts while they are sampled; no state touches the disk."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from recontrol.data.batches import MemoryRollouts, ScoredResponses
from recontrol.data.online import OnlineRollouts
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.fingerprint import difference
from recontrol.training.data import TrainingData, check_rewards, digest, origin
from recontrol.training.distributed import Processes


class OnlineData(TrainingData):
    """`OnlineRollouts`, whose batches are the mini-batches and `make` samples them; `validation` rollouts, if any, are held out.

    Rewards are standardised by those of `validation`, or without it by those of the first batch, which is sampled once more for that.
    """

    def __init__(
        self,
        online: OnlineRollouts,
        make: Callable[[int], ScoredResponses],
        validation: Rollouts | None,
        processes: Processes,
        *,
        dtype: torch.dtype,
        normalise_rewards: bool,
    ):
        self.online, self._make, self.validation, self.processes, self.normalise_rewards = online, make, validation, processes, normalise_rewards
        if validation is not None:
            check_rewards(validation)
            _check_validation(online, validation)
            self.rollouts = validation
        # How many heads there are shows in the rewards only.
        self.rewards = (make(0).batch() if validation is None else validation).rewards.to(dtype)
        if not len(self.rewards):
            raise ValueError("there are no rewards to begin with: stop strings cut the responses of the first batch to nothing, or validation has none")
        self.held_in, self.held_out = torch.arange(0), torch.arange(0 if validation is None else len(validation))
        self.hidden_size, self.num_heads = online.hidden_size, self.rewards.shape[1]
        self.states_dtype = online.dtype

    def units(self, epoch: int) -> Tensor:
        """What an epoch takes: batches, by the numbers of this pass over the prompts."""
        return torch.arange(len(self.online)) + epoch * len(self.online)

    def batch_size(self, asked: int | None, units: int) -> int:
        """Units in a mini-batch: one."""
        if asked is not None:
            raise ValueError(f"a mini-batch is a batch of OnlineRollouts, whose batch_size says how many prompts it has; found batch_size={asked!r} here too")
        return 1

    def fetch(self, batch: Tensor) -> tuple[Rollouts, Tensor]:
        """As `TrainingData.fetch`: sample a batch."""
        (number,) = batch.tolist()
        # What training reads of rollouts, a batch in memory has too.
        rollouts = cast(Rollouts, MemoryRollouts(self._make(number).batch()))
        return rollouts, torch.arange(len(rollouts.lengths))

    def check(self) -> None:
        """As `TrainingData.check`, of the validation rollouts."""
        if self.validation is not None:
            super().check()

    def settings(self, labels: tuple[Tensor, ...]) -> dict[str, Any]:
        """As `TrainingData.settings`; what the config says of mini-batches and of the split has no meaning here."""
        online = {name: entry for name, entry in self.online.settings.items() if name not in ("base_model", "made_with", "tokenizer")}
        validation = None if self.validation is None else digest(self.validation, *labels)
        return {"online": online, "validation": validation, "batch_size": None, "validation_fraction": 0.0}

    def provenance(self) -> dict[str, Any]:
        """As `TrainingData.provenance`."""
        return origin(self.online.settings)


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
