"""Objectives: what a value function is trained on. A new one is a subclass of `Objective` in a file of its own, imported here."""

from recontrol.training.objectives.base import OBJECTIVES, Objective, objective_of, settings_of_objectives
from recontrol.training.objectives.preference import order_scores, preference_loss, preference_regulariser
from recontrol.training.objectives.released import released_loss
from recontrol.training.objectives.tokens import TD, HeldOutError, bellman_targets, td_loss

__all__ = [
    "OBJECTIVES",
    "TD",
    "HeldOutError",
    "Objective",
    "bellman_targets",
    "objective_of",
    "order_scores",
    "preference_loss",
    "preference_regulariser",
    "released_loss",
    "settings_of_objectives",
    "td_loss",
]
