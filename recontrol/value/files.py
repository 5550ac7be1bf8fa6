"""Reading a value function's files: its folder, on this machine or on the hub, and the state dicts of the released code."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recontrol.files import read_json

FORMAT = "recontrol.value_function"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SIZES, STATISTICS = ("hidden_size", "hidden_dims", "num_heads"), ("reward_mean", "reward_std")


def checked_sizes(hidden_size: int, hidden_dims: Sequence[int], num_heads: int) -> list[int]:
    """The widths from the hidden state to the heads; a ValueError unless all are positive integers."""
    if not isinstance(hidden_dims, Sequence) or any(type(size) is not int or size < 1 for size in (hidden_size, *hidden_dims, num_heads)):
        raise ValueError(f"sizes must be positive integers, found hidden_size={hidden_size!r}, hidden_dims={hidden_dims!r}, num_heads={num_heads!r}")
    return [hidden_size, *hidden_dims, num_heads]


def checked_statistics(mean: Any, std: Any, num_heads: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of each head's rewards, or None for both; a ValueError for anything else."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"reward_mean and reward_std go together, found reward_mean={mean!r}, reward_std={std!r}")
    checked = []
    for name, given, minimum in (("reward_mean", mean, -math.inf), ("reward_std", std, 0)):
        try:
            numbers = tuple(map(float, given.tolist() if isinstance(given, Tensor) else given))
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be numbers, one a head, found {given!r}") from None
        if len(numbers) != num_heads or not all(math.isfinite(number) and number > minimum for number in numbers):
            raise ValueError(f"{name} must be {num_heads} finite numbers{' above 0' if minimum == 0 else ''}, one a head, found {list(numbers)}")
        checked.append(numbers)
    return checked[0], checked[1]


def local_folder(path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder of a value function, downloaded from the hub if it is not one already; errors as `ValueFunction.from_pretrained`."""
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder and has no revision {revision!r}; a revision is of a repository on the hub")
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; a value function is a folder, saved by save_pretrained; for a .pth file of the released code use from_released")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, token=token, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        asked = f"{str(path)!r}" if revision is None else f"{str(path)!r}, revision {revision!r}"
        offline = HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)
        hub = "the hub is not asked (HF_HUB_OFFLINE is set) and its cache on this machine has none" if offline else "the hub did not answer with one"
        raise FileNotFoundError(f"no value function at {asked}: it is no local folder, and {hub} ({type(error).__name__}: {error})") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a value function's config; a ValueError if it is missing or damaged, or does not describe a ReLU MLP of ours."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no value function: {path.name} is missing")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") or config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is not the config of a value function: found format {found!r}, wanted {FORMAT!r}")
    version, found = config.get("format_version"), (config.get("architecture"), config.get("activation"))
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this release reads up to {FORMAT_VERSION}; upgrade recontrol")
    if found != ("mlp", "relu"):
        raise ValueError(f"{path}: only ReLU MLPs are supported, found architecture {found[0]!r} with activation {found[1]!r}")
    sizes: Any = [config.get(name) for name in SIZES]
    try:
        checked_sizes(*sizes)
        checked_statistics(config.get("reward_mean"), config.get("reward_std"), sizes[-1])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config.get("provenance"), dict | None):
        raise ValueError(f"{path}: provenance must be an object, found {config['provenance']!r}")
    return config


def read_value(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a value function; a ValueError if a file is missing, damaged, or of another format."""
    config, path = read_config(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no value function: {path.name} is missing")
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it was cut short or is of another format") from error


def read_released(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Read a state dict of the released code: weight and bias of each linear layer, first layer first; errors as `ValueFunction.from_released`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the released code writes a .pth file (for a folder use from_pretrained)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        # From damaged bytes an unpickler raises nearly anything.
        raise ValueError(f"{path} is no readable torch state dict ({type(error).__name__}): it is damaged, or holds other things than tensors") from error
    names = ("fc1", "fc2", "fc3") if isinstance(state, dict) and "fc2.weight" in state else ("fc1", "fc3")
    wanted = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    found = set(state) if isinstance(state, dict) else {type(state).__name__}
    if found != wanted:
        raise ValueError(f"{path} is no value function of the released code: found keys {sorted(map(str, found))}, wanted fc1, fc3 and optionally fc2")
    if not all(isinstance(tensor, Tensor) and tensor.numel() and tensor.dim() == 1 + name.endswith("weight") for name, tensor in state.items()):
        shapes = {name: tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__ for name, tensor in state.items()}
        raise ValueError(f"{path} is no value function of the released code: found {shapes}, wanted matrices as weights and vectors as biases")
    return [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
