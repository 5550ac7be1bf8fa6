"""recontrol: align a language model at test time by editing its representations (RE-Control)."""
# Names of a module "as" themselves, which makes them public, stay on one line.
# ruff: noqa: I001

import importlib
from typing import TYPE_CHECKING, Any

from recontrol import moved
from recontrol.ascent import oracle as oracle
from recontrol.ascent.ascend import ascend as ascend
from recontrol.ascent.backends import backend_info as backend_info
from recontrol.checks import renamed
from recontrol.decoding.control import Control as Control
from recontrol.decoding.controller import Controller as Controller
from recontrol.value import ValueFunction as ValueFunction, WeightedSum as WeightedSum
from recontrol.version import __version__ as __version__

if TYPE_CHECKING:
    from recontrol.data.collect import collect as collect, collect_pairs as collect_pairs, collect_texts as collect_texts
    from recontrol.data.dialogue import Prompt as Prompt
    from recontrol.data.join import join_rollouts as join_rollouts
    from recontrol.data.online import OnlineRollouts as OnlineRollouts
    from recontrol.data.prompts import load_pairs as load_pairs, load_prompts as load_prompts, load_prompts_with_preferred as load_prompts_with_preferred
    from recontrol.data.relabel import relabel as relabel
    from recontrol.data.rewards import Judge as Judge, RewardModel as RewardModel
    from recontrol.data.rollouts import Rollouts as Rollouts
    from recontrol.data.settings import Collection as Collection
    from recontrol.decoding.config import Decoding as Decoding
    from recontrol.decoding.fingerprint import model_fingerprint as model_fingerprint
    from recontrol.decoding.static_decoder import StaticDecoder as StaticDecoder
    from recontrol.evaluation.evaluate import evaluate as evaluate
    from recontrol.evaluation.frontier import at_equal_kl as at_equal_kl, choose_at_kl as choose_at_kl, knee as knee, pareto as pareto
    from recontrol.evaluation.judges import PairwiseJudge as PairwiseJudge, RewardJudge as RewardJudge
    from recontrol.evaluation.next_token import path_of_steps as path_of_steps
    from recontrol.evaluation.results import Result as Result, choose as choose
    from recontrol.evaluation.win_rate import win_rate as win_rate
    from recontrol.generation.generate import generate as generate
    from recontrol.generation.requests import Generation as Generation, Trace as Trace
    from recontrol.training.config import TrainConfig as TrainConfig
    from recontrol.training.diagnosis import diagnose as diagnose
    from recontrol.training.train import train as train, train_online as train_online

moved.install()

# Imported when first asked for: what decodes under control needs neither data sets nor training, nor the second they take to import.
_ON_DEMAND = {
    "data.collect": ("collect", "collect_pairs", "collect_texts"),
    "data.dialogue": ("Prompt",),
    "data.join": ("join_rollouts",),
    "data.online": ("OnlineRollouts",),
    "data.prompts": ("load_pairs", "load_prompts", "load_prompts_with_preferred"),
    "data.relabel": ("relabel",),
    "data.rewards": ("Judge", "RewardModel"),
    "data.rollouts": ("Rollouts",),
    "data.settings": ("Collection",),
    "decoding.config": ("Decoding",),
    "decoding.fingerprint": ("model_fingerprint",),
    "decoding.static_decoder": ("StaticDecoder",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.frontier": ("at_equal_kl", "choose_at_kl", "knee", "pareto"),
    "evaluation.judges": ("PairwiseJudge", "RewardJudge"),
    "evaluation.next_token": ("path_of_steps",),
    "evaluation.results": ("Result", "choose"),
    "evaluation.win_rate": ("win_rate",),
    "generation.generate": ("generate",),
    "generation.requests": ("Generation", "Trace"),
    "training.config": ("TrainConfig",),
    "training.diagnosis": ("diagnose",),
    "training.train": ("train", "train_online"),
}
_MODULE_OF = {name: f"recontrol.{module}" for module, names in _ON_DEMAND.items() for name in names}
_AT_ONCE = ("Control", "Controller", "ValueFunction", "WeightedSum", "__version__", "ascend", "backend_info", "oracle")
__all__ = sorted([*_AT_ONCE, *_MODULE_OF])
# Names of earlier releases, and what they are called now.
_RENAMED = {"load_prompts_with_references": "load_prompts_with_preferred", "reference": "oracle"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        renamed(f"recontrol.{name}", f"recontrol.{_RENAMED[name]}")
        return getattr(importlib.import_module("recontrol"), _RENAMED[name])
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
