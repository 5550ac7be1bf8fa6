"""The settings from the environment: the bank of value functions, and the control of requests that carry none."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from recontrol.decoding.control import Control
from recontrol.value import ValueFunction
from recontrol.value.files import CONFIG_NAME, WEIGHTS_NAME, read_config
from recontrol.vllm_plugin.controls import parse_control

BANK = "RECONTROL_BANK"
DEFAULT = "RECONTROL_DEFAULT"
# Where a request carries its control: a key of `extra_args`, or of `vllm_xargs` over HTTP.
KEY = "recontrol"


@dataclass(frozen=True)
class Settings:
    """The settings of the plugin.

    Attributes:
        bank: the folder whose subfolders are value functions; None where there is none and no request is steered.
        default: the control of requests that carry none, as given (JSON); None where those are not steered.
        known: the value functions of the bank by name, without weights: enough to check a control.
    """

    bank: Path | None = None
    default: str | None = None
    known: Mapping[str, ValueFunction] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read and check RECONTROL_BANK and RECONTROL_DEFAULT; an empty one counts as absent."""
        folder, default = environment.get(BANK) or None, environment.get(DEFAULT) or None
        if folder is None:
            if default is not None:
                raise ValueError(f"{DEFAULT} needs {BANK}, a folder whose subfolders are value functions; it is not set")
            return cls()
        # The processes of vLLM need not share a working directory.
        bank = Path(folder).absolute()
        known = _without_weights(bank)
        if default is not None:
            try:
                parse_control(default, known)
            except ValueError as error:
                raise ValueError(f"{DEFAULT}: {error}") from error
        return cls(bank, default, known)

    def load(self, device: torch.device) -> dict[str, ValueFunction]:
        """The value functions of the bank with their weights, on this device."""
        assert self.bank is not None
        return {name: ValueFunction.from_pretrained(self.bank / name, device=device) for name in self.known}

    def control_of(self, request: Mapping[str, object] | None, bank: Mapping[str, ValueFunction] | None = None) -> Control | None:
        """The control of a request with these `extra_args`, its value function from a bank (by default without weights); None: no control."""
        bank = self.known if bank is None else bank
        if request is None or KEY not in request:
            return None if self.default is None else parse_control(self.default, bank)
        if self.bank is None:
            raise ValueError(f"this server steers no request: it was started without {BANK}, a folder whose subfolders are value functions")
        return parse_control(request[KEY], bank)


def _without_weights(bank: Path) -> dict[str, ValueFunction]:
    if not bank.is_dir():
        raise FileNotFoundError(f"{BANK} is {bank}, which is no folder")
    folders = sorted(path for path in bank.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FileNotFoundError(f"{BANK} is {bank}, which holds no value function: a subfolder for each is wanted, as `save_pretrained` writes them")
    known = {}
    for folder in folders:
        if not (folder / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{folder} is no value function: it lacks {WEIGHTS_NAME}")
        config = read_config(folder / CONFIG_NAME)
        with torch.device("meta"):
            known[folder.name] = ValueFunction(config["hidden_size"], config["hidden_dims"], config["num_heads"], provenance=config.get("provenance"))
    return known
