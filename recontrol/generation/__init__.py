"""Batched generation with a control of its own for each prompt."""
