"""Objectives: what a value function is trained on. A new one is a subclass of `Objective` in a file of its own, imported here."""

from recontrol.training.objectives.base import OBJECTIVES, Objective, Values, objective_of, settings_of_objectives
from recontrol.training.objectives.preference import HeldOutPreference, Preference, preference_loss, preference_regulariser
from recontrol.training.objectives.released import Released, released_loss
from recontrol.training.objectives.tokens import TD, HeldOutError, MonteCarlo, TDLambda, bellman_targets, td_loss

__all__ = [
    "OBJECTIVES",
    "TD",
    "HeldOutError",
    "HeldOutPreference",
    "MonteCarlo",
    "Objective",
    "Preference",
    "Released",
    "TDLambda",
    "Values",
    "bellman_targets",
    "objective_of",
    "preference_loss",
    "preference_regulariser",
    "released_loss",
    "settings_of_objectives",
    "td_loss",
]
