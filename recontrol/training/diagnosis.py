"""What a value function knows as a response unfolds, and where it is wrong: numbers, a table and a figure."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrol.ambient import shielded
from recontrol.checks import required
from recontrol.data.rollouts import Rollouts
from recontrol.files import write_aside, write_json
from recontrol.training.data import parts
from recontrol.value import ValueFunction

# Okabe and Ito's palette, which readers who cannot see red and green can distinguish.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


@dataclass(frozen=True)
class Diagnosis:
    """V along responses; bin i of n, by relative position, holds the tokens t of T with i <= n (t + 1/2) / T < i + 1. None is what cannot be said."""

    responses: int
    tokens: list[int]
    # Of V(s_t) with the final reward over tokens.
    correlation: list[float | None]
    # 1 - mean (V(s_t) - r)^2 / Var(r): 0 for the mean reward.
    explained_variance: list[float | None]
    # Means of V(s_t) over the third of the responses with the largest rewards, and the smallest.
    best_third: list[float | None]
    worst_third: list[float | None]
    # (mean V, mean reward, tokens) in bins of V with as many tokens each; a calibrated V has the same in both.
    calibration: list[tuple[float, float, int]]
    # Root mean square of V(s_t) - V(s_0) over tokens, in standard deviations of the reward.
    movement: float | None


@shielded()
def diagnose(value: ValueFunction, rollouts: Rollouts, responses: torch.Tensor | None = None, *, bins: int = 10, head: int = 0) -> Diagnosis:
    """Compare V(s_t) with the final reward along responses, which should be of prompts that V was not trained on.

    Args:
        value: the value function; where it is standardised, its values are taken back to the unit of the reward.
        rollouts: states and rewards.
        responses: (n,), indices of the responses to take, at least 3; None takes all.
        bins: of relative position, and of V for the calibration.
        head: of V.
    """
    responses = torch.arange(len(rollouts)) if responses is None else responses
    if (rollouts.hidden_size, rollouts.num_heads) != (value.hidden_size, value.num_heads):
        has = f"states of {rollouts.hidden_size} numbers and {rollouts.num_heads} rewards"
        raise ValueError(f"{rollouts.path} has {has}, the value function wants {value.hidden_size} and {value.num_heads}")
    if not 0 <= head < value.num_heads:
        raise ValueError(f"head must be one of {value.num_heads}, found head={head!r}")
    read = (rollouts.batch(part).states.to(value.device) for part in parts(responses, rollouts.lengths))
    predicted = torch.cat([torch.empty(0), *(value.to_reward(value(states))[:, head].double().cpu() for states in read)])
    along = [values.numpy() for values in predicted.split(rollouts.lengths[responses].tolist())]
    return diagnose_values(along, rollouts.rewards[responses, head].tolist(), bins=bins)


def diagnose_values(values: Sequence[Any], rewards: Sequence[float], *, bins: int = 10) -> Diagnosis:
    """The same of V(s_t), in the unit of the reward, for each token of each response, as an evaluation records them; responses without a token are left out."""
    if len(values) != len(rewards):
        raise ValueError(f"found {len(rewards)} rewards for the values along {len(values)} responses, wanted one each")
    lengths = np.array([len(along) for along in values], dtype=int)
    final, lengths = np.array(rewards, dtype=float)[lengths > 0], lengths[lengths > 0]
    if len(lengths) < 3:
        raise ValueError(f"found {len(lengths)} responses with tokens to diagnose a value function on, wanted at least 3")
    if type(bins) is not int or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1, found bins={bins!r}")
    v = np.concatenate([np.asarray(along, dtype=float) for along in values])
    r, starts = np.repeat(final, lengths), np.repeat(lengths.cumsum() - lengths, lengths)
    place = np.minimum(((np.arange(len(v)) - starts + 0.5) / np.repeat(lengths, lengths) * bins).astype(int), bins - 1)
    low, high = np.quantile(final, [1 / 3, 2 / 3])
    inside = [place == number for number in range(bins)]

    def each(measure: Callable[[np.ndarray, np.ndarray], float | None]) -> list[float | None]:
        return [measure(v[rows], r[rows]) for rows in inside]

    by_value = np.array_split(np.argsort(v, kind="stable"), bins)
    return Diagnosis(
        responses=len(final),
        tokens=[int(rows.sum()) for rows in inside],
        correlation=each(lambda v, r: float(np.corrcoef(v, r)[0, 1]) if _varies(v) and _varies(r) else None),
        explained_variance=each(lambda v, r: float(1 - np.square(v - r).mean() / r.var()) if _varies(r) else None),
        best_third=each(lambda v, r: float(v[r >= high].mean()) if (r >= high).any() else None),
        worst_third=each(lambda v, r: float(v[r <= low].mean()) if (r <= low).any() else None),
        calibration=[(float(v[rows].mean()), float(r[rows].mean()), len(rows)) for rows in by_value if len(rows)],
        movement=float(np.sqrt(np.square(v - v[starts]).mean()) / final.std()) if _varies(final) else None,
    )


def _varies(numbers: np.ndarray) -> bool:
    return len(numbers) > 0 and bool(np.ptp(numbers))


def table(diagnoses: Mapping[str, Diagnosis]) -> str:
    """Correlation and explained variance along the response, a line for each value function, as aligned plain text."""
    lines, bins = [], len(next(iter(diagnoses.values())).tokens)
    for title, attribute in (("correlation of V with the final reward", "correlation"), ("explained variance", "explained_variance")):
        lines.append(f"{title}, {'by tenth of' if bins == 10 else 'along'} the response:")
        for name, found in diagnoses.items():
            cells = ["   -  " if number is None else f"{number:6.2f}" for number in getattr(found, attribute)]
            moves = "-" if found.movement is None else f"{found.movement:.2f}"
            lines.append(f"  {name[:24]:<24}{''.join(cells)}" + (f"   moves {moves} sd" if attribute == "correlation" else ""))
    return "\n".join(lines)


def save_diagnosis(out: str | os.PathLike, diagnoses: Mapping[str, Diagnosis]) -> None:
    """Write `diagnosis.json` and `diagnosis.png` into a folder; up to five value functions, by name, can be distinguished in the figure."""
    if not 1 <= len(diagnoses) <= len(COLOURS):
        raise ValueError(f"found {len(diagnoses)} value functions to draw, wanted 1 to {len(COLOURS)}")
    # Needs no display, and shares no state with a caller's own figures.
    figure = required("matplotlib.figure", "report").Figure(figsize=(14, 4.5), layout="constrained")
    along, thirds, calibration = figure.subplots(1, 3)
    for (name, found), colour in zip(diagnoses.items(), COLOURS, strict=False):
        places = (np.arange(len(found.tokens)) + 0.5) / len(found.tokens)
        for axes, numbers, style in ((along, found.correlation, "o-"), (thirds, found.best_third, "-"), (thirds, found.worst_third, "--")):
            # None becomes NaN, which is not drawn.
            axes.plot(places, np.array(numbers, dtype=float), style, color=colour, label=name)
        predicted, observed, _ = zip(*found.calibration, strict=True)
        calibration.plot(predicted, observed, "o-", color=colour)
    along.axhline(0, color="grey", linewidth=0.8)
    # Where predicted and observed reward are the same.
    calibration.axline((predicted[0], predicted[0]), slope=1, color="grey", linewidth=0.8, linestyle=":")
    along.set(title="Correlation of V with the final reward", xlabel="position in the response", ylim=(-1.05, 1.05))
    thirds.set(title="V: best third by reward (solid), worst (dashed)", xlabel="position in the response")
    calibration.set(title="Calibration: mean final reward against V", xlabel="V")
    for axes in (along, thirds, calibration):
        axes.grid(alpha=0.25)
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=len(diagnoses), frameon=False)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with write_aside(folder / "diagnosis.png") as aside:
        figure.savefig(aside, format="png", dpi=130)
    write_json(folder / "diagnosis.json", {"format": "recontrol.diagnosis", "value_functions": {name: asdict(found) for name, found in diagnoses.items()}})
