"""The value function, its files, and what is prepared from its weights."""

from recontrol.value.function import ValueFunction, WeightedSum

__all__ = ["ValueFunction", "WeightedSum"]
