"""Choosing step size, steps and other strengths: many settings decoded together, and the frontier of reward against divergence."""
