"""The settings from the environment, the bank of value functions and the control of requests that carry none; and the control that a request carries."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recontrol.decoding.control import Control, control_from_mapping
from recontrol.value import ValueFunction
from recontrol.value.files import CONFIG_NAME, WEIGHTS_NAME, read_config

BANK = "RECONTROL_BANK"
DEFAULT = "RECONTROL_DEFAULT"
# Where a request carries its control: a key of `extra_args`, or of `vllm_xargs` over HTTP.
KEY = "recontrol"
# A policy of the server: a request must not keep the others waiting. The paper takes 200 steps at most.
MOST_STEPS = 1000


@dataclass(frozen=True)
class Settings:
    """The folder whose subfolders are value functions, the control of requests that carry none (JSON), and the value functions without their weights."""

    bank: Path | None = None
    default: str | None = None
    known: Mapping[str, ValueFunction] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read and check RECONTROL_BANK and RECONTROL_DEFAULT; an empty one counts as absent."""
        folder, default = environment.get(BANK) or None, environment.get(DEFAULT) or None
        if folder is None and default is not None:
            raise ValueError(f"{DEFAULT} needs {BANK}, a folder whose subfolders are value functions; it is not set")
        if folder is None:
            return cls()
        # The processes of vLLM need not share a working directory.
        bank = Path(folder).absolute()
        if not bank.is_dir():
            raise FileNotFoundError(f"{BANK} is {bank}, which is no folder")
        known = {}
        for each in sorted(path for path in bank.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if not (each / WEIGHTS_NAME).is_file():
                raise FileNotFoundError(f"{each} is no value function: it lacks {WEIGHTS_NAME}")
            config = read_config(each / CONFIG_NAME)
            with torch.device("meta"):
                known[each.name] = ValueFunction(config["hidden_size"], config["hidden_dims"], config["num_heads"], provenance=config.get("provenance"))
        if not known:
            raise FileNotFoundError(f"{BANK} is {bank}, which holds no value function: a subfolder for each is wanted, as `save_pretrained` writes them")
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


def as_json(given: Any) -> str:
    """A control as text, which can be sent to any process; a mapping may hold numbers of numpy and torch."""
    return str(given) if isinstance(given, str) else json.dumps(given, default=lambda each: each.tolist())


def parse_control(given: Any, bank: Mapping[str, ValueFunction]) -> Control | None:
    """The control of a request: None, a mapping with the fields of `Control`, where `value` is a name of the bank, or the same as JSON (`vllm_xargs`)."""
    try:
        given = json.loads(as_json(given))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'a control must be JSON such as {{"value": "name", "step_size": 0.5, "steps": 30}}, found {_shown(given)}') from None
    if given is None:
        return None

    def value_of(name: Any) -> ValueFunction:
        # A name of the listing, never a path: nothing outside the bank can be reached.
        if not isinstance(name, str) or name not in bank:
            found = "it is missing" if name is None else f"found {_shown(name)}"
            raise ValueError(f"value must name a value function of this server, one of {', '.join(map(repr, bank))}; {found}")
        return bank[name]

    control = control_from_mapping(given, value_of)
    if control.steps > MOST_STEPS:
        raise ValueError(f"steps must be {MOST_STEPS} or less, found {control.steps}")
    control.check_range(torch.float32)
    return control


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 100 else text[:100] + "..."
