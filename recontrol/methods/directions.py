"""Directions in the space of hidden states along which the reward rises, found from rollouts in one pass and constant memory."""

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
from recontrol.files import interrupts_wait, write_aside
from recontrol.methods.scores import one_score
from recontrol.training.data import check_rewards, check_states, parts

FORMAT = "recontrol.direction"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the space of the states that are read to sample tokens, as long as such a state is on average.

    So a strength of 0.1 moves a state by a tenth of the usual norm, whatever the model and however the direction was found.

    Args:
        vector: (hidden_size,), kept as float32 on the CPU.
        origin: how it was found, in a few words, for tables.
        provenance: what it was found from: `base_model`, as `model_fingerprint` describes it, and settings.

    Raises:
        TypeError: `vector` is no tensor, `origin` no text.
        ValueError: `vector` is no vector, is zero or is not finite.
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
        """Width of the states that it is for."""
        return len(self.vector)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to one safetensors file, whole or not at all.

        Args:
            path: of the file; its folder is made if absent.

        Raises:
            OSError: the file cannot be written.
        """
        about = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "origin": self.origin, "provenance": json.dumps(self.provenance)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            aside.write_bytes(save({"vector": self.vector}, metadata=about))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Direction":
        """Read what `save` has written.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, holds something else, or is of a later release.
        """
        try:
            with interrupts_wait(), safe_open(path, "pt") as file:
                about = file.metadata() or {}
                vector = file.get_tensor("vector") if "vector" in file.keys() else None  # noqa: SIM118
        except FileNotFoundError:
            raise FileNotFoundError(f"no direction at {path}: there is no such file") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); it was cut short or is of another format") from error
        if about.get("format") != FORMAT or vector is None:
            raise ValueError(f"{path} holds no direction: found format {about.get('format')!r}, wanted {FORMAT!r}")
        version = about.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version!r}, this release reads up to {FORMAT_VERSION}; upgrade recontrol")
        return cls(vector, about["origin"], json.loads(about["provenance"]))


def reward_direction(rollouts: Rollouts | str | os.PathLike, *, ridge: float = 0.1, head_weights: Sequence[float] | None = None) -> Direction:
    """The weight w of a ridge regression of the final reward on the states.

    min over w, b of  mean_t (w . s_t + b - r)^2 + lambda |w|^2,  lambda = ridge * (mean variance of a coordinate of s),

    over all states of all responses; every token counts the same. The normal equations are added up in float64, so memory does not grow with the
    rollouts: it takes hidden_size^2 numbers. What a `ridge` does is the same in every unit of states and rewards; a large one leaves the covariance of
    states and reward as the direction.

    Args:
        rollouts: of the uncontrolled model: what `collect` made, or its folder.
        ridge: above 0.
        head_weights: one number a reward, where there are several: their weighted sum is regressed.

    Returns:
        w, as long as the states are on average. The provenance has `explained`, the share of the reward's variance over tokens that the regression
        explains on its own data.

    Raises:
        TypeError, ValueError: a ridge that is not above 0, weights that do not go with the rewards, rewards that are all the same or not finite, states
            that are not finite.

    Source: Kong et al. 2024, section 5 (baselines: static representation editing).
    """
    began = time.perf_counter()
    if number("ridge", ridge, 0) == 0:
        raise ValueError("ridge must be above 0, found 0")
    rollouts, scores = _scored(rollouts, head_weights)
    width, count = rollouts.hidden_size, rollouts.num_tokens
    # States and, as the last column, scores. Deviations from the middle of the first part, so that no digits are lost to a large mean.
    shift: Tensor | None = None
    total, products, norms = torch.zeros(width + 1, dtype=torch.float64), torch.zeros(width + 1, width + 1, dtype=torch.float64), 0.0
    for states, of_tokens in _parts(rollouts, torch.arange(len(rollouts)), scores):
        rows = torch.cat([states, of_tokens[:, None]], dim=1)
        shift = rows.mean(0) if shift is None else shift
        rows -= shift
        total += rows.sum(0)
        products.addmm_(rows.T, rows)
        norms += float(states.norm(dim=1).sum())
    mean = total / count
    covariance = products / count - mean.outer(mean)
    of_states, with_score, variance = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
    penalty = ridge * of_states.diagonal().mean()
    if not penalty > 0:
        raise ValueError(f"the states of {rollouts.path} are all the same: there is no direction in them")
    factor = torch.linalg.cholesky(of_states + penalty * torch.eye(width, dtype=torch.float64))
    weight = torch.cholesky_solve(with_score[:, None], factor)[:, 0]
    explained = float((2 * weight @ with_score - weight @ of_states @ weight) / variance)
    return _direction(weight, norms / count, "reward regression", rollouts, began, ridge=ridge, head_weights=head_weights, explained=explained)


def mean_difference(rollouts: Rollouts | str | os.PathLike, *, share: float = 0.25, head_weights: Sequence[float] | None = None) -> Direction:
    """The mean state of the best-rewarded responses minus that of the worst-rewarded ones; every token counts the same.

    Args:
        rollouts: of the uncontrolled model: what `collect` made, or its folder. Only the best and worst responses are read.
        share: of the responses, above 0 and up to 0.5, that are the best, and as many that are the worst; at least one.
        head_weights: one number a reward, where there are several: responses are ordered by the weighted sum.

    Returns:
        The difference, as long as the states that were read are on average.

    Raises:
        TypeError, ValueError: another share, weights that do not go with the rewards, rewards that are not finite or too often the same to tell the best
            from the worst, states that are not finite.
    """
    began = time.perf_counter()
    if not 0 < number("share", share, 0) <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5, found {share}")
    rollouts, scores = _scored(rollouts, head_weights)
    order = scores.argsort(stable=True)
    count = max(1, int(share * len(order)))
    ends = {"worst": order[:count], "best": order[len(order) - count :]}
    low, high = scores[ends["worst"][-1]], scores[ends["best"][0]]
    if not low < high:
        raise ValueError(f"a reward of {high:g} is among the worst {count} responses and among the best {count}: a smaller share could tell them apart")
    means, norms, tokens = {}, 0.0, 0
    for name, indices in ends.items():
        total, read = torch.zeros(rollouts.hidden_size, dtype=torch.float64), int(rollouts.lengths[indices].sum())
        # In the order of the files.
        for states, _ in _parts(rollouts, indices.sort().values, scores):
            total += states.sum(0)
            norms += float(states.norm(dim=1).sum())
        means[name], tokens = total / read, tokens + read
    return _direction(means["best"] - means["worst"], norms / tokens, "mean difference", rollouts, began, share=share, head_weights=head_weights)


def _scored(rollouts: Rollouts | str | os.PathLike, head_weights: Sequence[float] | None) -> tuple[Rollouts, Tensor]:
    """The rollouts, opened, and one number a response: (responses,), float64."""
    rollouts = rollouts if isinstance(rollouts, Rollouts) else Rollouts(rollouts)
    check_rewards(rollouts)
    scores = one_score(rollouts.rewards, head_weights)
    if (scores == scores[0]).all():
        raise ValueError(f"all rewards of {rollouts.path} are the same: no direction can be told from another")
    return rollouts, scores


def _parts(rollouts: Rollouts, indices: Tensor, scores: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """States (tokens, hidden_size) of some responses at a time, in float64, and for each the score of its response."""
    for part in parts(indices, rollouts.lengths):
        batch = rollouts.batch(part)
        if not batch.states.isfinite().all():
            # Names all of them.
            check_states(rollouts)
        yield batch.states.double(), scores[part].repeat_interleave(batch.lengths)


def _direction(vector: Tensor, norm: float, origin: str, rollouts: Rollouts, began: float, **settings: Any) -> Direction:
    length = float(vector.norm())
    if not length > 0:
        raise ValueError(f"the {origin} of {rollouts.path} is zero: the states do not depend on the reward")
    manifest = cast(dict[str, Any], rollouts.manifest)
    data = {"responses": len(rollouts), "tokens": rollouts.num_tokens}
    provenance = {"base_model": manifest.get("base_model"), "reward": manifest.get("reward"), "data": data, **settings}
    weights = settings.get("head_weights")
    provenance["head_weights"] = None if weights is None else [float(weight) for weight in weights]
    return Direction(vector * (norm / length), origin, {**provenance, "training_seconds": time.perf_counter() - began})
