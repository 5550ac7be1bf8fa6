"""A fine-tuned model as a method: a LoRA adapter on the caller's own model, put on for a block and taken off again."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from recontrol.checks import required
from recontrol.decoding.batches import evaluation_mode, seeded
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import forget_compiled
from recontrol.files import read_json
from recontrol.methods.base import Method, Training

EXTRA = "fine-tuning"
FORMAT = "recontrol.fine_tuning"
RECORD_NAME = "fine_tuning.json"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class FineTuningRun:
    """A finished run of training, in its folder `path` as `fine_tuning.json`, beside the adapter as `peft.PeftModel.from_pretrained` takes it.

    `settings` are all that the result depends on; `seconds` and `peak_bytes` (memory beyond that before) are of training, without sampling the pairs, over
    all sessions of a run that was stopped; `history` has one dict an optimisation step, by the trainer's names ("step", "loss", "reward", ...).
    """

    path: Path
    settings: dict[str, Any]
    trainable_parameters: int
    seconds: float
    peak_bytes: int
    history: list[dict[str, float]]

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The run that wrote a folder; FileNotFoundError or ValueError where there is none, or a damaged record."""
        file = Path(path) / RECORD_NAME
        content = read_json(file)
        found = content.pop("format", None) if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            raise ValueError(f"{file} is not the record of a run of fine-tuning: found format {found!r}, wanted {FORMAT!r}")
        return cls(path=Path(path), **content)


@contextlib.contextmanager
def adapter(model: Any, path: str | os.PathLike) -> Iterator[None]:
    """Inside the block the layers of `model` compute W x + (alpha / rank) B A x, with A and B of the LoRA adapter in `path`; afterwards all is as before."""
    peft = required("peft", EXTRA)
    folder = Path(path)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: wanted a folder with {CONFIG_NAME} in it")
    check_plain(model)
    other = difference(FineTuningRun.read(folder).settings["base_model"], model) if (folder / RECORD_NAME).is_file() else None
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


@dataclass(frozen=True, eq=False)
class FineTuned(Method):
    """The language model with the LoRA adapter in the folder `path`, put on for each batch (Kong et al. 2024, section 5; Hu et al. 2021, section 4.1)."""

    path: str | os.PathLike
    run: FineTuningRun = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", FineTuningRun.read(self.path))

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The algorithm of the fine-tuning."""
        return f"LoRA {self.run.settings['algorithm'].upper()}"

    @property
    def settings(self) -> dict[str, Any]:
        """The price of divergence, and the learning rate."""
        return {"beta": self.run.settings["beta"], "learning rate": self.run.settings["learning_rate"]}

    @property
    def identity(self) -> Any:
        """All settings of the run."""
        return {**self.run.settings, "seconds": self.run.seconds, "folder": Path(self.path).name}

    @property
    def training(self) -> Training:
        """The cost of the run."""
        return Training(self.run.trainable_parameters, self.run.seconds, self.run.peak_bytes)

    def attach(self, model: Any) -> contextlib.AbstractContextManager:
        """Put the adapter on until the end of a `with` block."""
        return adapter(model, self.path)


def check_plain(model: Any) -> None:
    """Refuse a model that has adapters; the first is named."""
    layer = required("peft", EXTRA).tuners.tuners_utils.BaseTunerLayer
    found = next((name for name, module in model.named_modules() if isinstance(module, layer)), None)
    if found is not None:
        raise ValueError(f"the model must have no adapter, found one on {found}: merge it or take it off first")


@contextlib.contextmanager
def flags_kept(model: Any) -> Iterator[None]:
    """Restore after the block which parameters require gradients, and their gradients."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
