"""Objectives: what a value function is trained on. A new one is a subclass of `Objective` in a file of its own, imported here."""

from recontrol.training.objectives.preference import Preference
from recontrol.training.objectives.tokens import OBJECTIVES, TD, Objective, Released

__all__ = ["OBJECTIVES", "TD", "Objective", "Preference", "Released"]
