"""Decoding: the hooks on a language model (control, recording), which model it is, and responses in batches."""
