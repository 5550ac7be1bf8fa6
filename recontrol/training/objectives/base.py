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
    """A loss, a score on what is held out, and the settings that they take; first checked, then bound to data. One with a name can be asked for."""

    name: ClassVar[str] = ""
    # Of its loss in the history.
    loss_name: ClassVar[str] = "train_loss"
    # The fields of `TrainConfig` that are its own; its instances have them as attributes.
    takes: ClassVar[tuple[str, ...]] = ()
    # Whether it can learn from one batch of responses after the other, without seeing them all first.
    online: ClassVar[bool] = True
    # Whether V predicts the reward; else only its differences mean anything.
    predicts_reward: bool = True
    # One line for the provenance, in which {0.td_lambda:g} is a setting.
    description: str = ""
    # What it is bound to, the unit in which it counts rewards, and what of the data, beside lengths, rewards and prompts, decides the result.
    data: TrainingData
    standardisation: Standardisation
    labels: tuple[Tensor, ...] = ()
    # What mini-batches are made of: responses, prompts, or batches.
    units: Tensor

    def __init_subclass__(cls) -> None:
        if cls.name:
            OBJECTIVES[cls.name] = cls

    def __init__(self, **settings: Any):
        vars(self).update(settings)
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""

    def bind(self, data: TrainingData) -> None:
        """Find in the data what it learns from."""
        self.data, self.standardisation, self.units = data, Standardisation.of(data.rewards), data.held_in

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """Add this process's share of the gradient of a mini-batch: its sum of the loss in the unit of the reward, and the count of all processes."""
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
