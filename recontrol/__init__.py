"""recontrol: align a language model at test time by editing its representations (RE-Control)."""

import importlib
from typing import TYPE_CHECKING, Any

from recontrol import reference
from recontrol.ascend import ascend
from recontrol.backends import backend_info
from recontrol.decoding.controller import Controller
from recontrol.value import ValueFunction
from recontrol.version import __version__

if TYPE_CHECKING:
    from recontrol.data.collect import collect
    from recontrol.data.prompts import load_prompts
    from recontrol.data.rewards import RewardModel
    from recontrol.data.rollouts import Rollouts
    from recontrol.evaluation.evaluate import choose, evaluate
    from recontrol.training.train import train

# Imported when first asked for: what decodes under control needs neither data sets nor training, nor the second they take to import.
_ON_DEMAND = {
    "RewardModel": "recontrol.data.rewards",
    "Rollouts": "recontrol.data.rollouts",
    "choose": "recontrol.evaluation.evaluate",
    "collect": "recontrol.data.collect",
    "evaluate": "recontrol.evaluation.evaluate",
    "load_prompts": "recontrol.data.prompts",
    "train": "recontrol.training.train",
}

__all__ = [
    "Controller",
    "RewardModel",
    "Rollouts",
    "ValueFunction",
    "__version__",
    "ascend",
    "backend_info",
    "choose",
    "collect",
    "evaluate",
    "load_prompts",
    "reference",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
