"""recontrol: align a language model at test time by editing its representations (RE-Control)."""

import importlib
from typing import TYPE_CHECKING, Any

from recontrol import moved
from recontrol.ascent import oracle
from recontrol.ascent.ascend import ascend
from recontrol.ascent.backends import backend_info
from recontrol.checks import renamed
from recontrol.decoding.control import Control
from recontrol.decoding.controller import Controller
from recontrol.value import ValueFunction, WeightedSum
from recontrol.version import __version__

if TYPE_CHECKING:
    from recontrol.data.collect import collect, collect_pairs, collect_texts
    from recontrol.data.dialogue import Prompt
    from recontrol.data.join import join_rollouts
    from recontrol.data.online import OnlineRollouts
    from recontrol.data.prompts import load_pairs, load_prompts, load_prompts_with_preferred
    from recontrol.data.relabel import relabel
    from recontrol.data.rewards import Judge, RewardModel
    from recontrol.data.rollouts import Rollouts
    from recontrol.data.settings import Collection
    from recontrol.decoding.config import Decoding
    from recontrol.decoding.fingerprint import model_fingerprint
    from recontrol.decoding.static_decoder import StaticDecoder
    from recontrol.evaluation.evaluate import evaluate
    from recontrol.evaluation.frontier import at_equal_kl, choose_at_kl, knee, pareto
    from recontrol.evaluation.judges import PairwiseJudge, RewardJudge
    from recontrol.evaluation.next_token import path_of_steps
    from recontrol.evaluation.results import Result, choose
    from recontrol.evaluation.win_rate import win_rate
    from recontrol.generation.generate import generate
    from recontrol.generation.requests import Generation, Trace
    from recontrol.training.config import TrainConfig
    from recontrol.training.diagnosis import diagnose
    from recontrol.training.train import train, train_online

moved.install()

# Imported when first asked for: what decodes under control needs neither data sets nor training, nor the second they take to import.
_ON_DEMAND = {
    "Collection": "recontrol.data.settings",
    "Decoding": "recontrol.decoding.config",
    "Generation": "recontrol.generation.requests",
    "Judge": "recontrol.data.rewards",
    "OnlineRollouts": "recontrol.data.online",
    "PairwiseJudge": "recontrol.evaluation.judges",
    "Result": "recontrol.evaluation.results",
    "RewardJudge": "recontrol.evaluation.judges",
    "RewardModel": "recontrol.data.rewards",
    "Rollouts": "recontrol.data.rollouts",
    "StaticDecoder": "recontrol.decoding.static_decoder",
    "TrainConfig": "recontrol.training.config",
    "Trace": "recontrol.generation.requests",
    "at_equal_kl": "recontrol.evaluation.frontier",
    "choose": "recontrol.evaluation.results",
    "choose_at_kl": "recontrol.evaluation.frontier",
    "collect": "recontrol.data.collect",
    "collect_pairs": "recontrol.data.collect",
    "collect_texts": "recontrol.data.collect",
    "diagnose": "recontrol.training.diagnosis",
    "evaluate": "recontrol.evaluation.evaluate",
    "generate": "recontrol.generation.generate",
    "join_rollouts": "recontrol.data.join",
    "knee": "recontrol.evaluation.frontier",
    "load_pairs": "recontrol.data.prompts",
    "Prompt": "recontrol.data.dialogue",
    "load_prompts": "recontrol.data.prompts",
    "load_prompts_with_preferred": "recontrol.data.prompts",
    "model_fingerprint": "recontrol.decoding.fingerprint",
    "pareto": "recontrol.evaluation.frontier",
    "path_of_steps": "recontrol.evaluation.next_token",
    "relabel": "recontrol.data.relabel",
    "train": "recontrol.training.train",
    "train_online": "recontrol.training.train",
    "win_rate": "recontrol.evaluation.win_rate",
}

__all__ = [
    "Collection",
    "Control",
    "Controller",
    "Decoding",
    "Generation",
    "Judge",
    "OnlineRollouts",
    "PairwiseJudge",
    "Prompt",
    "Result",
    "RewardJudge",
    "RewardModel",
    "Rollouts",
    "StaticDecoder",
    "Trace",
    "TrainConfig",
    "ValueFunction",
    "WeightedSum",
    "__version__",
    "ascend",
    "at_equal_kl",
    "backend_info",
    "choose",
    "choose_at_kl",
    "collect",
    "collect_pairs",
    "collect_texts",
    "diagnose",
    "evaluate",
    "generate",
    "join_rollouts",
    "knee",
    "load_pairs",
    "load_prompts",
    "load_prompts_with_preferred",
    "model_fingerprint",
    "oracle",
    "pareto",
    "path_of_steps",
    "relabel",
    "train",
    "train_online",
    "win_rate",
]


# Names of earlier releases, and what they are called now.
_RENAMED = {"load_prompts_with_references": "load_prompts_with_preferred", "reference": "oracle"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        renamed(f"recontrol.{name}", f"recontrol.{_RENAMED[name]}")
        return getattr(importlib.import_module("recontrol"), _RENAMED[name])
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
