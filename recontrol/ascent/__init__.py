"""Gradient ascent on a value function: the operation, its oracle and its backends."""
