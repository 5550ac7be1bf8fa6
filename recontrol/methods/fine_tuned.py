"""A fine-tuned model as one method among others."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import LogitsProcessor

from recontrol.methods.adapters import adapter
from recontrol.methods.base import Method, Training
from recontrol.methods.fine_tuning_run import FineTuningRun

NAMES = {"dpo": "LoRA DPO", "rloo": "LoRA RLOO", "grpo": "LoRA GRPO"}


@dataclass(frozen=True, eq=False)
class FineTuned(Method):
    """The language model with a LoRA adapter, put on for each batch and taken off again.

    Args:
        path: a folder that `train_dpo` or `train_rl` has written.

    Raises:
        FileNotFoundError: it holds no run.
        ValueError: its record is damaged.

    Source: Kong et al. 2024, section 5 (comparison with fine-tuning).
    """

    path: str | os.PathLike

    def __post_init__(self) -> None:
        # Said now, rather than when responses are wanted.
        _ = self.run

    @cached_property
    def run(self) -> FineTuningRun:
        """What was trained, and what it took."""
        return FineTuningRun.read(self.path)

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The algorithm of the fine-tuning."""
        algorithm = str(self.run.settings.get("algorithm"))
        return NAMES.get(algorithm, algorithm)

    @property
    def settings(self) -> dict[str, Any]:
        """How much it is held to the model, and the learning rate."""
        return {"beta": self.run.settings.get("beta"), "learning rate": self.run.settings.get("learning_rate")}

    @property
    def identity(self) -> Any:
        """All settings of the run."""
        return {**self.run.settings, "seconds": self.run.seconds, "folder": Path(self.path).name}

    @property
    def training(self) -> Training:
        """What the run took."""
        return Training(self.run.trainable_parameters, self.run.seconds, self.run.peak_bytes)

    @contextlib.contextmanager
    def applied(self, model: Any, tokenizer: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[list[LogitsProcessor]]:
        """Put the adapter on inside the block.

        Args:
            model: the language model.
            tokenizer: not looked at.
            prompts: not looked at.
            options: not looked at.
        """
        with adapter(model, self.path):
            yield []
