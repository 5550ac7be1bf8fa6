"""What a report compares: rows with their gains, which row is really the best, settings along a sweep, and rewards at equal divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from recontrol.evaluation.frontier import AtKL, at_equal_kl
from recontrol.evaluation.metrics import bootstrap_difference
from recontrol.evaluation.results import Result, by_prompt
from recontrol.evaluation.win_rate import WinRate

# Divergences at which rows are compared, and how far below the largest the smallest may be.
MOST_LEVELS, RANGE = 6, 1000


@dataclass
class Findings:
    """What a study found: results on the test `prompts`, with a name and perhaps a win rate each, the uncontrolled model's first, without a win rate."""

    results: list[Result]
    names: list[str]
    prompts: list[str]
    # On the validation prompts, the uncontrolled model and all settings; by the name of a row, which of these are its own; labels of the chosen ones.
    validation: list[Result] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)
    # Empty without a judge; and what they compare with.
    wins: list[WinRate | None] = field(default_factory=list)
    against: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the report; `gain` over the uncontrolled model, paired by prompt, is None for that model itself, `win` where nobody judged."""

    name: str
    result: Result
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    win: WinRate | None = None

    @property
    def setting(self) -> str:
        """The settings in words; empty where there are none."""
        return ", ".join(f"{name} {given:g}" if isinstance(given, float) else f"{name} {given}" for name, given in self.result.settings.items())

    @property
    def score(self) -> float:
        """The paper's sum, by which settings are chosen."""
        return (self.result.coherence or 0.0) + self.result.diversity + self.result.reward


@dataclass(frozen=True)
class EqualKL:
    """Rows at the same divergences `levels`, in nats a response: by name `rewards`, one entry a level, and the `largest` (KL, reward) of any setting."""

    levels: list[float]
    rewards: dict[str, list[AtKL]]
    largest: dict[str, tuple[float, float]]
    # Names of the rows whose divergence was not measured.
    unknown: list[str]
    on_validation: bool

    def better_before(self, place: int) -> list[str]:
        """Rows that do not reach this level, and yet have a larger reward than every row that does."""
        reached = [entries[place].reward or 0.0 for entries in self.rewards.values() if entries[place].reward is not None]
        return [name for name, entries in self.rewards.items() if entries[place].reward is None and reached and self.largest[name][1] > max(reached)]


def make_rows(findings: Findings) -> list[Row]:
    """The rows, in order, the uncontrolled model first; ValueError where results, names, prompts and win rates do not fit."""
    results, names, wins = findings.results, findings.names, findings.wins or [None] * len(findings.results)
    if not results or not len(results) == len(names) == len(wins):
        raise ValueError(f"a report needs results with a name each, found {len(results)} results, {len(names)} names and {len(wins)} win rates")
    for result in results:
        if len(result.responses) != (wanted := len(findings.prompts) * result.seeds):
            found = f"{len(result.responses)} responses to {len(findings.prompts)} prompts with {result.seeds} seeds"
            raise ValueError(f"{result.method} has {found}, wanted {wanted}")
    base = results[0]
    gains = [(None, None), *((result.reward - base.reward, gain_interval(result, base)) for result in results[1:])]
    return [Row(name, result, *gain, win) for name, result, gain, win in zip(names, results, gains, wins, strict=True)]


def gain_interval(result: Result, base: Result) -> tuple[float, float]:
    """95 % paired bootstrap interval, over prompts, of the reward minus that of another result; the seeds of a prompt are averaged first."""
    return bootstrap_difference(by_prompt(np.array(result.rewards), result.seeds), by_prompt(np.array(base.rewards), base.seeds))


def not_told_apart(numbers: Sequence[Sequence[float] | None], seeds: int) -> tuple[int, list[int]] | None:
    """(the row with the largest mean, the others whose paired difference from it may be chance); None where fewer than two rows have numbers.

    With k others, each difference has a bootstrap interval over prompts of level 1 - 0.05 / k, so that all of them hold together in 95 % of the cases.
    """
    means = {place: by_prompt(np.asarray(each, dtype=np.float64), seeds) for place, each in enumerate(numbers) if each}
    if len(means) < 2:
        return None
    best = max(means, key=lambda place: float(means[place].mean()))
    level = 1 - 0.05 / (len(means) - 1)
    return best, [place for place, mean in means.items() if place != best and bootstrap_difference(means[best], mean, level)[0] <= 0]


def sweep(findings: Findings) -> tuple[Result, dict[str, list[Result]]]:
    """(the uncontrolled model, by name the settings that were tried): on validation prompts, or where there are none those of the test, by kind."""
    if findings.validation:
        return findings.validation[0], {name: [findings.validation[place] for place in places] for name, places in findings.groups.items()}
    kinds: dict[str, dict[str, Result]] = {}
    for name, result in zip(findings.names[1:], findings.results[1:], strict=True):
        kinds.setdefault(result.kind, {})[name] = result
    # A group of one keeps the name of its row.
    return findings.results[0], {next(iter(rows)) if len(rows) == 1 else kind: list(rows.values()) for kind, rows in kinds.items()}


def equal_kl(findings: Findings) -> EqualKL | None:
    """The rows at equal divergence; None where no row's was measured."""
    base, groups = sweep(findings)
    # Estimates of a divergence that is 0 may be below it by rounding or sampling.
    known: Any = {name: [replace(each, kl=max(0.0, each.kl)) for each in points if each.kl is not None] for name, points in groups.items()}
    known = {name: points for name, points in known.items() if points}
    levels = kl_levels([max(point.kl for point in points) for points in known.values()])
    if not levels:
        return None
    largest = {name: max(((each.kl, each.reward) for each in points), key=lambda found: found[1]) for name, points in known.items()}
    rewards, unknown = at_equal_kl(known, levels, replace(base, kl=0.0)), [name for name in groups if name not in known]
    return EqualKL(levels, rewards, largest, unknown, bool(findings.validation))


def kl_levels(largest: Sequence[float]) -> list[float]:
    """Some of 1, 2 and 5 times the powers of ten, as far as two rows go, from where the row that goes least far can be compared, a tenth of that at most."""
    reached = sorted((kl for kl in largest if kl > 0), reverse=True)
    if not reached:
        return []
    limit = reached[:2][-1]
    least = max(limit / RANGE, min(reached[-1], limit / 10))
    nice = [float(f"{first}e{power}") for power in range(math.floor(math.log10(limit / RANGE)), math.ceil(math.log10(limit)) + 1) for first in (1, 2, 5)]
    begin = max((level for level in nice if level <= least), default=least)
    kept = [level for level in nice if begin <= level <= limit]
    # As evenly as the list allows.
    places = np.unique(np.linspace(0, len(kept) - 1, min(MOST_LEVELS, len(kept))).round().astype(int))
    return [kept[place] for place in places]
