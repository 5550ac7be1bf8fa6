"""The proof, before the first request, that edits reach the logits and are the same on every rank."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recontrol.decoding.control import Control
from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.editing import check_reach
from recontrol.value import ValueFunction

Edited = Callable[[Callable[[Tensor], Tensor]], AbstractContextManager[None]]
ROWS, STEP_SIZE, STEPS = 2, 0.1, 3


@torch.inference_mode()
def prove(runner: Any, bank: Mapping[str, ValueFunction], editing: Edited) -> None:
    """Run made-up states through the model's logits, as they are and edited; inside `editing(edit)` the next states are edited."""
    model = runner.get_model()
    width = next(iter(bank.values())).hidden_size
    # The same on every rank.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, width, generator=generator, dtype=torch.float32, device="cpu").to(device=runner.device, dtype=runner.model_config.dtype)
    # Layers of adapters (LoRA) look up the adapter of each row, which is that of a request; these rows have none.
    adapters = getattr(runner, "lora_config", None)
    with nullcontext() if adapters is None else runner.maybe_select_dummy_loras(adapters, np.ones(ROWS, dtype=np.int32)):
        logits = [model.compute_logits(hidden), model.compute_logits(hidden)]
        with editing(torch.neg):
            logits.append(model.compute_logits(hidden))
    # Of tensor-parallel ranks that do not sample, some get no logits.
    if logits[0] is not None:
        check_reach("the states", type(model).__name__, logits, "so it computes them in a way that the plugin recontrol does not know")
    for name, value in bank.items():
        batch = ControlBatch()
        batch.assign(Control(value, STEP_SIZE, STEPS, head_weights=(1.0,) * value.num_heads))
        edited = batch.edit(hidden)
        if not torch.isfinite(value(edited)).all():
            raise RuntimeError(f"the value function {name!r} gives values that are not finite; its weights are damaged")
        _check_ranks(name, edited)


def _check_ranks(name: str, edited: Tensor) -> None:
    """Refuse tensor-parallel ranks that would go on from different states."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

    size = get_tensor_model_parallel_world_size()
    gathered = [edited] if size == 1 else tensor_model_parallel_all_gather(edited.contiguous(), dim=0).chunk(size)
    if not all(torch.equal(part, edited) for part in gathered):
        raise RuntimeError(f"the tensor-parallel ranks edit states differently with the value function {name!r}")
