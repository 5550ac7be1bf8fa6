"""Static representation editing: one vector is added to every state that is read to sample a token, and how to find such a vector."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recontrol.checks import number
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.control_batch import ControlBatch
from recontrol.decoding.editing import Editing, states_device
from recontrol.decoding.fingerprint import difference
from recontrol.decoding.hooks import input_width
from recontrol.files import interrupts_wait, write_aside
from recontrol.methods.base import Method, Training, one_score, tensors_checksum
from recontrol.training.data import check_rewards, check_states, parts

FORMAT = "recontrol.direction"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction (hidden_size,), float32 on the CPU; its norm is the mean norm of a state, so a strength of 0.1 moves a state by a tenth of that.

    `origin` says in a few words, for tables, how it was found; `provenance` holds `base_model`, as `model_fingerprint` describes it, and settings.
    """

    vector: Tensor
    origin: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or not isinstance(self.origin, str):
            raise TypeError(f"a direction is a tensor and a text, found {type(self.vector).__name__} and {type(self.origin).__name__}")
        vector = self.vector.detach().float().cpu().contiguous()
        if vector.dim() != 1 or not vector.isfinite().all() or not vector.any():
            raise ValueError(f"a direction must be a finite vector other than zero, found shape {tuple(vector.shape)}, largest {vector.abs().amax():g}")
        object.__setattr__(self, "vector", vector)

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return len(self.vector)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; its folder is made if absent."""
        about = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "origin": self.origin, "provenance": json.dumps(self.provenance)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            aside.write_bytes(save({"vector": self.vector}, metadata=about))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Direction":
        """Read what `save` has written; ValueError for a file that is damaged, holds something else, or is of a later release."""
        if not Path(path).exists():
            raise FileNotFoundError(f"no direction at {path}: there is no such file")
        try:
            with interrupts_wait(), safe_open(path, "pt") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); it was cut short or is of another format") from error
        if about.get("format") != FORMAT or "vector" not in tensors:
            raise ValueError(f"{path} holds no direction: found format {about.get('format')!r}, wanted {FORMAT!r}")
        version = about.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version!r}, this release reads up to {FORMAT_VERSION}; upgrade recontrol")
        return cls(tensors["vector"], about["origin"], json.loads(about["provenance"]))


def reward_direction(rollouts: Rollouts | str | os.PathLike, *, ridge: float = 0.1, head_weights: Sequence[float] | None = None) -> Direction:
    """The weight w of a ridge regression of the final reward on the states, scaled to the mean norm of the states.

    min over w, b of  mean_t (w . s_t + b - r)^2 + lambda |w|^2,  lambda = ridge * (mean variance of a coordinate of s),

    over all states of all responses, in float64. `explained` in the provenance is the share of the reward's variance that the regression explains.
    The rollouts are of the uncontrolled model; of several rewards the sum weighted by `head_weights` is regressed.
    Source: Kong et al. 2024, section 5 (baselines: static representation editing).
    """
    began = time.perf_counter()
    if number("ridge", ridge, 0) == 0:
        raise ValueError("ridge must be above 0, found 0")
    rollouts, scores = _scored(rollouts, head_weights)
    width, count = rollouts.hidden_size, rollouts.num_tokens
    # States and, as the last column, scores; minus the mean of the first part, so that no digits are lost to a large mean.
    shift: Tensor | None = None
    total, norms = torch.zeros(width + 1, dtype=torch.float64, device="cpu"), 0.0
    products = total.new_zeros(width + 1, width + 1)
    for states, of_tokens in _parts(rollouts, torch.arange(len(rollouts), device="cpu"), scores):
        rows = torch.cat([states, of_tokens[:, None]], dim=1)
        shift = rows.mean(0) if shift is None else shift
        rows -= shift
        total += rows.sum(0)
        products.addmm_(rows.T, rows)
        norms += float(states.norm(dim=1).sum())
    covariance = products / count - (total / count).outer(total / count)
    of_states, with_score, variance = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
    penalty = ridge * of_states.diagonal().mean()
    if not penalty > 0:
        raise ValueError(f"the states of {rollouts.path} are all the same: there is no direction in them")
    factor = torch.linalg.cholesky(of_states + penalty * torch.eye(width, dtype=torch.float64, device="cpu"))
    weight = torch.cholesky_solve(with_score[:, None], factor)[:, 0]
    explained = float((2 * weight @ with_score - weight @ of_states @ weight) / variance)
    return _direction(weight, norms / count, "reward regression", rollouts, began, head_weights, ridge=ridge, explained=explained)


def mean_difference(rollouts: Rollouts | str | os.PathLike, *, share: float = 0.25, head_weights: Sequence[float] | None = None) -> Direction:
    """The mean state of the best-rewarded responses minus that of the worst-rewarded ones, scaled to the mean norm of both; every token counts the same.

    `share` of the responses count as the best, and as the worst: above 0, at most 0.5; at least one response each, and only these are read. The rollouts are
    of the uncontrolled model; where there are several rewards, responses are ordered by the sum weighted by `head_weights`.
    """
    began = time.perf_counter()
    if not 0 < number("share", share, 0) <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5, found {share}")
    rollouts, scores = _scored(rollouts, head_weights)
    order = scores.argsort(stable=True)
    count = max(1, int(share * len(order)))
    worst, best = order[:count], order[len(order) - count :]
    if not scores[worst[-1]] < scores[best[0]]:
        same = f"a reward of {scores[best[0]]:g} is among the worst {count} responses and among the best {count}"
        raise ValueError(f"{same}: a smaller share could tell them apart")
    means, norms = [], 0.0
    for indices in (worst, best):
        total = torch.zeros(rollouts.hidden_size, dtype=torch.float64, device="cpu")
        for states, _ in _parts(rollouts, indices.sort().values, scores):
            total += states.sum(0)
            norms += float(states.norm(dim=1).sum())
        means.append(total / rollouts.lengths[indices].sum())
    norm = norms / int(rollouts.lengths[torch.cat([worst, best])].sum())
    return _direction(means[1] - means[0], norm, "mean difference", rollouts, began, head_weights, share=share)


def _scored(rollouts: Rollouts | str | os.PathLike, head_weights: Sequence[float] | None) -> tuple[Rollouts, Tensor]:
    """The rollouts, opened, and one number a response: (responses,), float64."""
    rollouts = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    check_rewards(rollouts)
    scores = one_score(rollouts.rewards, head_weights)
    if (scores == scores[0]).all():
        raise ValueError(f"all rewards of {rollouts.path} are the same: no direction is better than another")
    return rollouts, scores


def _parts(rollouts: Rollouts, indices: Tensor, scores: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """States (tokens, hidden_size) of some responses at a time, in float64, and for each the score of its response."""
    for part in parts(indices, rollouts.lengths):
        batch = rollouts.batch(part)
        if not batch.states.isfinite().all():
            # Raises, and names all of them.
            check_states(rollouts)
        yield batch.states.double(), scores[part].repeat_interleave(batch.lengths)


def _direction(vector: Tensor, norm: float, origin: str, rollouts: Rollouts, began: float, head_weights: Any, **settings: Any) -> Direction:
    if not vector.norm() > 0:
        raise ValueError(f"the {origin} of {rollouts.path} is zero: the states do not depend on the reward")
    manifest = cast(dict[str, Any], rollouts.manifest)
    provenance = {"data": {"responses": len(rollouts), "tokens": rollouts.num_tokens}, **settings, "training_seconds": time.perf_counter() - began}
    provenance |= {name: manifest.get(name) for name in ("base_model", "reward")}
    provenance["head_weights"] = None if head_weights is None else [float(weight) for weight in head_weights]
    return Direction(vector * (norm / float(vector.norm())), origin, provenance)


@dataclass(frozen=True, eq=False)
class StaticEditing(Method):
    """Representation editing by a constant: y_t ~ softmax(W_lm (o_t + strength * d)).

    o_t is the state at the position whose logits sample y_t; only such positions are edited, that of the prompt's last token too. d has the mean norm of
    a state; a negative strength lowers the reward. `allow_other_model` accepts a direction that was found in the states of another model.
    Source: Kong et al. 2024, section 5 (baselines: static representation editing).
    """

    kind = "static editing"
    direction: Direction
    strength: float
    allow_other_model: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise TypeError(f"direction must be a Direction, found {type(self.direction).__name__}")
        object.__setattr__(self, "strength", number("strength", self.strength))

    @property
    def settings(self) -> dict[str, Any]:
        """The origin of the direction, and the strength."""
        return {"by": self.direction.origin, "strength": self.strength}

    @property
    def identity(self) -> str:
        """A checksum of the direction."""
        return tensors_checksum([self.direction.vector])

    @property
    def training(self) -> Training:
        """The numbers of the direction, and how long it took to find them where that was recorded."""
        return Training(self.direction.hidden_size, self.direction.provenance.get("training_seconds"), None)

    def edit(self, states: Tensor) -> Tensor:
        """(rows, hidden_size) -> o_t + strength * d, in the dtype of the states; a row that would leave its range stays as it is."""
        batch = ControlBatch()
        batch.count_on(states.device)
        return _moved(batch, states, self.strength * self.direction.vector.to(states.device))

    def attach(self, model: Any) -> "StaticHandle":
        """Edit what `model` reads until the end of a `with` block; the direction must fit the model, and nothing else that edits may be attached."""
        return StaticHandle(self, model)


class StaticHandle(Editing):
    """The hook of static editing on one model, made by `StaticEditing.attach`; `detach` or leaving its `with` block removes it."""

    def __init__(self, editing: StaticEditing, model: Any):
        super().__init__(model)
        direction, width = editing.direction, input_width(self.owner, self.embedding)
        if direction.hidden_size != width:
            found = f"the output embedding of this {type(self.owner).__name__} reads size {width}"
            raise ValueError(f"the direction is for hidden states of size {direction.hidden_size}, {found}")
        recorded = direction.provenance.get("base_model")
        other = difference(recorded, self.model) if isinstance(recorded, dict) and not editing.allow_other_model else None
        if other is not None:
            raise ValueError(f"the direction was found in the states of another model: {other}; attach it anyway with allow_other_model=True")
        self.steers = editing.strength != 0
        # Moved once, so that a decode step copies nothing.
        self._added = editing.strength * direction.vector.to(states_device(self))
        self._batch.count_on(self._added.device)
        self.attach()

    def edit(self, hidden: Tensor, rows: Any) -> Tensor | None:
        """The states moved by the constant."""
        return _moved(self._batch, hidden.reshape(-1, hidden.shape[-1]), self._added).reshape(hidden.shape) if self.steers else None


def _moved(batch: ControlBatch, states: Tensor, added: Tensor) -> Tensor:
    """The sum, rounded once to the dtype of the states; rows that are not finite then stay as they were, and are counted."""
    return batch.keep(states, (states + added).to(states.dtype))[0]
