"""Training: the objective, the loop, and its checkpoints."""
