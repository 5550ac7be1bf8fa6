"""The value function, a ReLU multilayer perceptron on a language model's last hidden state, and weighted sums of value functions."""

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from recontrol.ambient import AUTOCAST
from recontrol.checks import renamed
from recontrol.files import write_aside, write_json
from recontrol.value import files
from recontrol.value.card import CARD_NAME, model_card
from recontrol.value.files import CONFIG_NAME, SIZES, STATISTICS, WEIGHTS_NAME
from recontrol.value.prepared import Prepared, PreparedCache
from recontrol.version import __version__


class ValueFunction(nn.Module):
    """Predicts the final reward of a response from the hidden state that is read to sample its next token.

    V(h) = W_L relu(... relu(W_1 h + b_1) ...) + b_L: (..., hidden_size) -> (..., num_heads), in the dtype of the weights, float32 until `to` changes it.
    V is in the unit of the reward, or, with `reward_mean` and `reward_std`, standardised: reward = std * V + mean, head by head (`to_reward`).

    Args:
        hidden_size: width of the language model's last hidden state.
        hidden_dims: widths of the hidden layers; `(4096,)` is the paper's "two linear layers".
        num_heads: how many rewards are predicted at once.
        reward_mean: (num_heads,), finite, the mean of each head's rewards in training, if V is standardised; else None.
        reward_std: (num_heads,), finite and above 0, their standard deviation; None if and only if `reward_mean` is.
        provenance: where the weights come from (base model, data, reward model), saved beside them.

    Source: Kong et al. 2024, section 4.2 (value function).
    """

    layers: Any

    def __init__(
        self,
        hidden_size: int,
        hidden_dims: Sequence[int] = (4096,),
        num_heads: int = 1,
        *,
        reward_mean: Sequence[float] | None = None,
        reward_std: Sequence[float] | None = None,
        provenance: dict[str, Any] | None = None,
    ):
        super().__init__()
        sizes = files.checked_sizes(hidden_size, hidden_dims, num_heads)
        self.hidden_size, self.hidden_dims, self.num_heads = hidden_size, tuple(hidden_dims), num_heads
        self.reward_mean, self.reward_std = files.checked_statistics(reward_mean, reward_std, num_heads)
        self.provenance: dict[str, Any] = dict(provenance or {})
        # Weights made under inference_mode have no version counter, so a change of weights could not be seen.
        with torch.inference_mode(False):
            self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float32) for a, b in itertools.pairwise(sizes))
        self._cache = PreparedCache()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return V(hidden): (..., hidden_size) -> (..., num_heads), in the dtype of the weights under autocast too."""
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False) if kind in AUTOCAST else contextlib.nullcontext():
            activations = hidden.to(self.dtype)
            for layer in self.layers[:-1]:
                activations = torch.relu(layer(activations))
            return self.layers[-1](activations)

    def to_reward(self, values: Tensor) -> Tensor:
        """Values in the unit of the reward: (..., num_heads) * std + mean, unchanged where V is not standardised; a ValueError for another shape."""
        mean, std = self._statistics(values)
        return values if mean is None else values * std + mean

    def from_reward(self, rewards: Tensor) -> Tensor:
        """Rewards in V's own unit: ((..., num_heads) - mean) / std, unchanged where V is not standardised; a ValueError for another shape."""
        mean, std = self._statistics(rewards)
        return rewards if mean is None else (rewards - mean) / std

    def _statistics(self, numbers: Tensor) -> tuple[Any, Any]:
        if not numbers.ndim or numbers.shape[-1] != self.num_heads:
            raise ValueError(f"the last dimension must be the {self.num_heads} heads, found shape {tuple(numbers.shape)}")
        return (None, None) if self.reward_mean is None else (numbers.new_tensor(self.reward_mean), numbers.new_tensor(self.reward_std))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.layers[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.layers[0].weight.device

    @property
    def parameters_by_kind(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and the biases, first layer first."""
        linears = list(self.layers)
        return [layer.weight for layer in linears], [layer.bias for layer in linears]

    def prepared(self) -> Prepared:
        """What the fast paths precompute from the weights, W_1 W_1^T for example; computed again when a weight has changed."""
        return self._cache.get(*self.parameters_by_kind)

    # `0.7 * helpful + 0.3 * harmless`, climbed as one value function; what is subtracted is climbed down.
    def __mul__(self, weight: float) -> "ValueFunction":
        return WeightedSum([(weight, self)])

    __rmul__ = __mul__

    def __add__(self, other: "ValueFunction") -> "ValueFunction":
        return WeightedSum([(1.0, self), (1.0, other)])

    def __sub__(self, other: "ValueFunction") -> "ValueFunction":
        return WeightedSum([(1.0, self), (-1.0, other)])

    def __neg__(self) -> "ValueFunction":
        return WeightedSum([(-1.0, self)])

    def extra_repr(self) -> str:
        """Describe the sizes in `repr`."""
        return f"hidden_size={self.hidden_size}, hidden_dims={self.hidden_dims}, num_heads={self.num_heads}"

    @property
    def config(self) -> dict[str, Any]:
        """What `save_pretrained` writes beside the weights."""
        kind = {"format": files.FORMAT, "format_version": files.FORMAT_VERSION, "architecture": "mlp", "activation": "relu"}
        described = {name: getattr(self, name) for name in (*SIZES, *STATISTICS, "provenance")}
        return kind | {name: list(given) if isinstance(given, tuple) else given for name, given in described.items()}

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`, each whole or not at all; an OSError if it cannot be written."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Both files are written before either is moved into place, so that an error leaves both old ones.
        with write_aside(folder / WEIGHTS_NAME) as aside:
            # Not save_file, whose error at a full disk is no OSError that names the file.
            aside.write_bytes(save(tensors, metadata={"format": files.FORMAT}))
            write_json(folder / CONFIG_NAME, self.config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload value function",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card made from the provenance, to the hub; the address of the commit or pull request.

        A repository or branch is made if there is none; `token` is by default the one that `hf auth login` stored. After an error nothing was committed.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        api = HfApi(token=token, library_name="recontrol", library_version=__version__)
        with tempfile.TemporaryDirectory() as folder:
            # Saved before the hub is asked for anything: what cannot be saved leaves no empty repository there.
            self.save_pretrained(folder)
            try:
                name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not create_pr:
                    api.create_branch(name, branch=revision, exist_ok=True)
                (Path(folder) / CARD_NAME).write_text(model_card(folder, name), encoding="utf-8")
                commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr)
            except OSError as error:
                raise OSError(f"could not push to {repo_id!r}: {error}") from error
        return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "ValueFunction":
        """Load what `save_pretrained` wrote, from a local folder or, by `owner/name`, a `revision` of a repository of the hub.

        The weights keep their dtype unless `dtype` is given; a FileNotFoundError or ValueError says that there is none, or that its files are damaged.
        """
        folder = files.local_folder(path, revision, token)
        return cls._from_tensors(*files.read_value(folder), folder / WEIGHTS_NAME).to(device=device, dtype=dtype)

    @classmethod
    def from_released(cls, path: str | os.PathLike, *, provenance: dict[str, Any] | None = None) -> "ValueFunction":
        """Load a `.pth` file of the released code (only tensors are unpickled), recording `provenance`; a ValueError for keys that are not fc1, (fc2,) fc3."""
        path = Path(path)
        layers = files.read_released(path)
        sizes = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)]
        config = {"hidden_size": sizes[0], "hidden_dims": sizes[1:-1], "num_heads": sizes[-1], "provenance": {"source": path.name, **(provenance or {})}}
        tensors = {f"layers.{i}.{part}": tensor for i, layer in enumerate(layers) for part, tensor in zip(("weight", "bias"), layer, strict=True)}
        return cls._from_tensors(config, tensors, path)

    @classmethod
    def from_reference(cls, path: str | os.PathLike, *, provenance: dict[str, Any] | None = None) -> "ValueFunction":
        """The name of `from_released` in earlier releases."""
        renamed("ValueFunction.from_reference", "ValueFunction.from_released")
        return cls.from_released(path, provenance=provenance)

    @classmethod
    def _from_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], source: Path) -> "ValueFunction":
        """The value function that a config describes with the tensors of a file, whose names, shapes and dtypes are checked."""
        # Nothing is allocated before the file is known to agree, and no random numbers are drawn for weights that are replaced.
        with torch.device("meta"):
            settings: dict[str, Any] = {name: config.get(name) for name in (*SIZES, *STATISTICS, "provenance")}
            value = cls(**settings)
        wanted = {name: tuple(tensor.shape) for name, tensor in value.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != found:
            raise ValueError(f"{source} does not hold the weights its config describes: found {found}, wanted {wanted}")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
            raise ValueError(f"{source} must hold weights of one floating-point dtype, found {sorted(map(str, dtypes))}")
        value.to(next(iter(dtypes))).to_empty(device="cpu").load_state_dict(tensors)
        return value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # As in the constructor: a copy that was made or unpickled under inference_mode.
        with torch.inference_mode(False):
            for layer in self.layers:
                for name, given in [each for each in layer.named_parameters() if each[1].is_inference()]:
                    setattr(layer, name, nn.Parameter(given.detach().clone(), given.requires_grad))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueFunction":
        # As in the constructor: `to` and its like must not make weights without a version counter.
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)


class WeightedSum(ValueFunction):
    """V(h) = sum_k weight_k V_k(h), written `0.7 * helpful + 0.3 * harmless`: one wider value function, a copy, in the unit of the sum.

    Args:
        terms: (weight, value function), all of the same depth, hidden size, heads, dtype and device; sums are replaced by their own terms.

    Source: Kong et al. 2024, section 4.3, for a sum in the place of V.
    """

    def __init__(self, terms: Sequence[tuple[float, ValueFunction]]):
        flat = _flattened(terms)
        first = flat[0][1]
        widths = [sum(value.hidden_dims[layer] for _, value in flat) for layer in range(len(first.hidden_dims))]
        provenance = {"terms": [{"weight": weight, **value.provenance} for weight, value in flat]}
        # Nothing is drawn at random for weights that are replaced.
        with torch.device("meta"):
            super().__init__(first.hidden_size, widths, first.num_heads, provenance=provenance)
        self.terms = flat
        self.to(first.dtype).to_empty(device=first.device)
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                last = number == len(self.layers) - 1
                parts = [(scale if last else 1.0, value.layers[number]) for scale, value in flat]
                weights, biases = [scale * part.weight for scale, part in parts], [scale * part.bias for scale, part in parts]
                # Hidden layers stand side by side, all on the same states or each on its own units; the last one adds them up.
                if last:
                    layer.weight.copy_(torch.cat(weights, dim=1) if number else torch.stack(weights).sum(0))
                else:
                    layer.weight.copy_(torch.block_diag(*weights) if number else torch.cat(weights))
                layer.bias.copy_(torch.stack(biases).sum(0) if last else torch.cat(biases))

    def extra_repr(self) -> str:
        """Describe the sizes and the weights in `repr`."""
        return f"{super().extra_repr()}, weights={tuple(weight for weight, _ in self.terms)}"


def _flattened(terms: Sequence[tuple[float, ValueFunction]]) -> tuple[tuple[float, ValueFunction], ...]:
    """The terms with sums multiplied out; errors as `WeightedSum`."""
    flat: list[tuple[float, ValueFunction]] = []
    for weight, value in terms:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"a weight must be a number, found {weight!r}")
        if not isinstance(value, ValueFunction):
            raise TypeError(f"a term must be a recontrol.ValueFunction, found {type(value).__name__}")
        inner = value.terms if isinstance(value, WeightedSum) else ((1.0, value),)
        flat += [(float(weight) * other, part) for other, part in inner]
    if not flat:
        raise ValueError("a weighted sum needs at least one term")
    if wrong := [weight for weight, _ in flat if not math.isfinite(weight)]:
        raise ValueError(f"weights must be finite, found {wrong[0]}")
    names = {"number of layers": "layers", "hidden size": "hidden_size", "number of heads": "num_heads", "dtype": "dtype", "device": "device"}
    for name, attribute in names.items():
        found = [len(value.layers) if attribute == "layers" else getattr(value, attribute) for _, value in flat]
        if len(set(found)) > 1:
            raise ValueError(f"the value functions of a weighted sum must have the same {name}, found {', '.join(map(str, found))}")
    return tuple(flat)
