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
        takes: the settings of its own, which are fields of `TrainConfig`; its instances have them as attributes.
        online: whether it can learn from one batch of responses after the other, without seeing them all first.
        predicts_reward: whether V predicts the reward; else only its differences mean anything.
        data: what it is bound to.
        standardisation: the unit in which it counts rewards.
        labels: what of the data, beside lengths, rewards and prompts, decides the result.
    """

    name: ClassVar[str] = ""
    loss_name: ClassVar[str] = "train_loss"
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
        raise NotImplementedError

    def bind(self, data: TrainingData) -> None:
        """Find in the data what it learns from."""
        raise NotImplementedError

    def units(self, epoch: int) -> Tensor:
        """What an epoch takes in some order and mini-batches are made of: responses, prompts or batches, as many in each epoch."""
        raise NotImplementedError

    def backward(self, values_of: Values, batch: Tensor) -> tuple[float, int]:
        """Add the gradient of the mean loss of a mini-batch to the parameters; this process does its share.

        Returns this process's sum of the loss in the unit of the reward, and what the sum of all processes is to be divided by.
        """
        raise NotImplementedError

    def validate(self, values_of: Values) -> dict[str, float | None]:
        """The scores on what is held out; empty if nothing is."""
        raise NotImplementedError

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """What the best epoch has most of, from its entry in the history; None without validation."""
        raise NotImplementedError

    def doubts(self, entry: Mapping[str, Any]) -> list[str]:
        """Warnings about the best epoch."""
        return []


def objective_of(name: str | None, settings: Mapping[str, Any]) -> Objective:
    """The objective of that name; None is "td", or "td-lambda" where td_lambda is above 0.

    Raises:
        ValueError: there is none, or it has no use for a setting that is not 0.
    """
    name = name or ("td-lambda" if settings["td_lambda"] else "td")
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    kind = OBJECTIVES[name]
    for other, setting in settings.items():
        if setting and other not in kind.takes:
            raise ValueError(f"the objective {name!r} has no {other}, found {setting!r}")
    return kind(**{own: settings[own] for own in kind.takes})


def settings_of_objectives() -> list[str]:
    """The settings that only some objectives take."""
    return sorted({name for kind in OBJECTIVES.values() for name in kind.takes})
