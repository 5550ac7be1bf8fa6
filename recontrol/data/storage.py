"""How hidden states are kept on disk: as they are, rounded to another floating-point dtype, or in 8 bits with a scale for each token."""

import torch
from torch import Tensor

# The dtype of the numbers on disk, and what a header of safetensors calls it.
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "int8": torch.int8}
HEADER_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8"}
LARGEST = 127


def check_storage(storage: str | None) -> None:
    """Refuse an unknown storage with a ValueError; None is the dtype of the states themselves."""
    if storage is not None and storage not in STORED:
        raise ValueError(f"unknown storage {storage!r}; choose one of {', '.join(map(repr, STORED))}, or None for the model's own dtype")


def encode(states: Tensor, storage: str) -> dict[str, Tensor]:
    """The tensors to write for (tokens, hidden_size) states: `states`, and for "int8" also `scales`, (tokens,), float32.

    With s_t = max_i |h_ti| / 127 for each token t, "int8" keeps q_ti = round(h_ti / s_t), and |q_ti s_t - h_ti| <= s_t / 2.
    ValueError for what the storage cannot hold.
    """
    if storage != "int8":
        encoded = states.to(STORED[storage])
        if states.isfinite().all() and not encoded.isfinite().all():
            raise ValueError(f"hidden states up to {float(states.abs().max()):.4g} do not fit into {storage}; use another storage")
        return {"states": encoded}
    if not states.isfinite().all():
        raise ValueError("hidden states must be finite to be stored in 8 bits, found NaN or infinite ones")
    exact = states.float()
    scales = exact.abs().amax(1) / LARGEST if exact.shape[1] else exact.new_zeros(len(exact))
    # A state of zeros has no scale.
    steps = exact / torch.where(scales > 0, scales, 1)[:, None]
    return {"states": steps.round().clamp(-LARGEST, LARGEST).to(torch.int8), "scales": scales}


def decode(states: Tensor, scales: Tensor | None) -> Tensor:
    """What `encode` made as states again: those of "int8" as float32, others as they were written."""
    return states if scales is None else states.float() * scales[:, None]
