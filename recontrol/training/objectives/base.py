"""What an objective is, and which there are."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from recontrol.training.data import Standardisation, TrainingData

# V of packed hidden states, (tokens, hidden_size) -> (tokens, num_heads).
Values = Callable[[Tensor], Tensor]
# By name; subclasses of `Objective` enter themselves.
OBJECTIVES: dict[str, type["Objective"]] = {}


class Objective:
    """A loss, a score on what is held out, and the settings that they take; first checked, then bound to data.

    Attributes:
        name: in settings; a subclass with a name is an objective that can be asked for.
        loss_name: of its loss in the history.
        description: one line for the provenance, in which {0.td_lambda:g} is a setting.
        takes: the settings of its own, which are fields of `TrainConfig`; its instances have them as attributes.
        online: whether it can learn from one batch of responses after the other, without seeing them all first.
        predicts_reward: whether V predicts the reward; else only its differences mean anything.
        data, standardisation: what it is bound to, and the unit in which it counts rewards.
        labels: what of the data, beside lengths, rewards and prompts, decides the result.
    """

    name: ClassVar[str] = ""
    loss_name: ClassVar[str] = "train_loss"
    description: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()
    online: ClassVar[bool] = True

    predicts_reward: bool = True
    data: TrainingData
    standardisation: Standardisation
    labels: tuple[Tensor, ...] = ()

    def __init_subclass__(cls) -> None:
        if cls.name:
            OBJECTIVES[cls.name] = cls

    def __init__(self, **settings: Any):
        vars(self).update(settings)
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""

    def describe(self) -> str:
        """One line for the provenance."""
        return self.description.format(self)

    def bind(self, data: TrainingData) -> None:
        """Find in the data what it learns from."""
        self.data, self.standardisation = data, Standardisation.of(data.rewards)

    def units(self, epoch: int) -> Tensor:
        """What an epoch takes in some order and mini-batches are made of: responses, prompts or batches, as many in each epoch."""
        return self.data.units(epoch)

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """Add the gradient of the mean loss of a mini-batch to the parameters; this process does its share.

        Returns this process's sum of the loss in the unit of the reward, and what the sum of all processes is to be divided by.
        """
        raise NotImplementedError

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """The scores on what is held out; empty if nothing is."""
        raise NotImplementedError

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """What the best epoch has most of: minus the Monte Carlo error, each head's in units of its flat error where defined; None without validation."""
        error, explained = entry.get("validation_mc_error"), entry.get("validation_explained_variance")
        return explained if error is None or explained is not None else -error

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """Warnings about the best epoch."""
        explained = entry.get("validation_explained_variance")
        if explained is None or explained > 0:
            return []
        found = f"on prompts held out the value function predicts rewards no better than their mean (explained variance {explained:.3g})"
        return [f"{found}: it needs more rollouts, or a reward that depends on the response"]
