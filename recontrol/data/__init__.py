"""Data: prompts, rewards, and rollouts of the uncontrolled model on disk."""
