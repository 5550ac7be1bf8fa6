"""LoRA adapters on the caller's own model: put on for a block, and taken off again without a trace."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recontrol.decoding.batches import evaluation_mode, seeded
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import forget_compiled
from recontrol.methods.fine_tuning_run import RECORD_NAME, FineTuningRun, check_plain, fine_tuning_package, flags_kept

CONFIG_NAME = "adapter_config.json"


@contextlib.contextmanager
def adapter(model: Any, path: str | os.PathLike) -> Iterator[None]:
    """Inside the block the model's layers compute W x + (alpha / rank) B A x, with the A and B of a LoRA adapter.

    The model object is the caller's: what holds it (`model.generate`, a controller) sees the adapter. The adapter is not merged into the
    weights, which stay as they are; so each layer takes two small products more, which merging would save. Afterwards, also after an
    exception, modules, flags and attributes of the model are those from before, and it computes what it did, to the bit.

    Args:
        model: a causal language model without adapters; it is in evaluation mode inside the block.
        path: a folder that `train_dpo` or `train_rl` has written, or any other that `peft.PeftModel.from_pretrained` reads.

    Raises:
        ImportError: the extra `fine-tuning` (the packages trl and peft) is not installed.
        FileNotFoundError: the folder holds no adapter.
        ValueError: the model has an adapter already, or the adapter was trained on another model.

    Source: Hu et al. 2021, section 4.1.
    """
    peft = fine_tuning_package("peft")
    folder = Path(path)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: wanted a folder with {CONFIG_NAME} in it")
    check_plain(model)
    if (folder / RECORD_NAME).is_file():
        other = difference(FineTuningRun.read(folder).settings["base_model"], model)
        if other:
            raise ValueError(f"the adapter in {folder} was trained on another model: {other}")
    modules = [(module, dict(module._modules)) for module in model.modules()]
    attributes = set(vars(model))
    with evaluation_mode(model), flags_kept(model):
        try:
            # Adapters are initialised at random before they are read.
            with seeded(0):
                peft.PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
            forget_compiled()
            yield
        finally:
            for module, children in modules:
                module._modules.clear()
                module._modules.update(children)
            for name in vars(model).keys() - attributes:
                delattr(model, name)
            forget_compiled()
