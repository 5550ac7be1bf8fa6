"""What a report compares: rows with their gains, which of them is really the best, settings along a sweep, and rewards at equal divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recontrol.evaluation.frontier import AtKL, at_equal_kl
from recontrol.evaluation.metrics import bootstrap_difference
from recontrol.evaluation.results import Result, by_prompt
from recontrol.evaluation.win_rate import WinRate
from recontrol.methods.control import ReControl
from recontrol.reports.findings import Findings

# Of the intervals that say which row is the best.
CHANCE = 0.05
# Divergences at which rows are compared, and how far below the largest the smallest may be.
MOST_LEVELS = 6
RANGE = 1000


@dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        name: what it is called.
        result: on the test prompts.
        gain: reward minus that of the uncontrolled model on the same prompts; None for the uncontrolled model itself.
        gain_interval: (low, high), 95 % paired bootstrap interval over prompts; None with `gain`.
        win: how often its responses are better; None where that was not judged.
    """

    name: str
    result: Result
    gain: float | None
    gain_interval: tuple[float, float] | None
    win: WinRate | None

    @property
    def setting(self) -> str:
        """The settings in words; empty where there are none."""
        return setting_text(self.result)


@dataclass(frozen=True)
class EqualKL:
    """Rows at the same divergences.

    Attributes:
        levels: nats a response, from the smallest.
        rewards: by the name of a row, one entry a level.
        largest: by the name of a row, (KL, reward) of its setting with the largest reward.
        unknown: names of the rows whose divergence was not measured.
        on_validation: whether these are the settings tried on validation prompts; else those of the test.
    """

    levels: list[float]
    rewards: dict[str, list[AtKL]]
    largest: dict[str, tuple[float, float]]
    unknown: list[str]
    on_validation: bool

    def better_before(self, place: int) -> list[str]:
        """Rows that do not reach a level, and yet have a larger reward than every row that does.

        Args:
            place: of the level.
        """
        reached = [entries[place].reward or 0.0 for entries in self.rewards.values() if entries[place].reward is not None]
        return [name for name, entries in self.rewards.items() if entries[place].reward is None and reached and self.largest[name][1] > max(reached)]


def make_rows(findings: Findings) -> list[Row]:
    """The rows, in order; the first is the uncontrolled model.

    Args:
        findings: what was found.

    Raises:
        ValueError: no results, another number of names or win rates than results, or of responses than prompts and seeds.
    """
    results, wins = findings.results, findings.wins or [None] * len(findings.results)
    if not results or not len(results) == len(findings.names) == len(wins):
        raise ValueError(f"a report needs results with a name each, found {len(results)} results, {len(findings.names)} names and {len(wins)} win rates")
    for result in results:
        if len(result.responses) != len(findings.prompts) * result.seeds:
            found = f"{len(result.responses)} responses to {len(findings.prompts)} prompts with {result.seeds} seeds"
            raise ValueError(f"{result.method} has {found}, wanted {len(findings.prompts) * result.seeds}")
    base = results[0]
    rows = []
    for name, result, win in zip(findings.names, results, wins, strict=True):
        gain = None if result is base else result.reward - base.reward
        rows.append(Row(name, result, gain, None if gain is None else gain_interval(result, base), win))
    return rows


def gain_interval(result: Result, base: Result) -> tuple[float, float]:
    """95 % paired bootstrap interval, over prompts, of the reward minus that of another result; the seeds of a prompt are averaged first."""
    return bootstrap_difference(by_prompt(np.array(result.rewards), result.seeds), by_prompt(np.array(base.rewards), base.seeds))


def setting_text(result: Result) -> str:
    """The settings of a result in words; empty where there are none."""
    listed = [f"{name} {setting:g}" if isinstance(setting, float) else f"{name} {setting}" for name, setting in result.settings.items()]
    return ", ".join(listed)


def not_told_apart(numbers: Sequence[Sequence[float] | None], seeds: int) -> tuple[int, list[int]] | None:
    """The row with the largest mean, and the others whose paired difference from it may be chance.

    With k others, each difference has a bootstrap interval over prompts of level 1 - 0.05 / k, so that all of them hold together in 95 % of the cases.

    Args:
        numbers: of each row one a response, seed after seed; None for a row that has none and is not compared.
        seeds: how many.

    Returns:
        (the row, the others); None where fewer than two rows have numbers.
    """
    means = {place: by_prompt(np.asarray(each, dtype=np.float64), seeds) for place, each in enumerate(numbers) if each}
    if len(means) < 2:
        return None
    best = max(means, key=lambda place: float(means[place].mean()))
    level = 1 - CHANCE / (len(means) - 1)
    return best, [place for place, mean in means.items() if place != best and bootstrap_difference(means[best], mean, level)[0] <= 0]


def sweep(findings: Findings) -> tuple[Result, dict[str, list[Result]]]:
    """(the uncontrolled model, by name the settings that were tried): on validation prompts, or where there are none those of the test, by kind."""
    if findings.validation:
        return findings.validation[0], {name: [findings.validation[place] for place in places] for name, places in findings.groups.items()}
    groups: dict[str, list[Result]] = {}
    for result in findings.results[1:]:
        groups.setdefault(result.kind, []).append(result)
    # A group of one keeps the name of its row.
    names = {id(result): name for name, result in zip(findings.names, findings.results, strict=True)}
    return findings.results[0], {names[id(several[0])] if len(several) == 1 else kind: several for kind, several in groups.items()}


def equal_kl(findings: Findings) -> EqualKL | None:
    """The rows at equal divergence; None where no row's was measured.

    Args:
        findings: what was found.
    """
    base, groups = sweep(findings)
    known = {name: [point for point in points if point.kl is not None] for name, points in groups.items()}
    unknown = [name for name, points in known.items() if not points]
    known = {name: points for name, points in known.items() if points}
    levels = kl_levels([max(point.kl for point in points if point.kl is not None) for points in known.values()])
    if not levels:
        return None
    # Estimates of a divergence that is 0 may be below it by rounding or sampling.
    points = {name: [_Point(max(0.0, point.kl or 0.0), point) for point in several] for name, several in known.items()}
    best = {name: max(several, key=lambda point: point.reward) for name, several in points.items()}
    largest = {name: (point.kl, point.reward) for name, point in best.items()}
    return EqualKL(levels, at_equal_kl(points, levels, _Point(0.0, base)), largest, unknown, bool(findings.validation))


class _Point:
    """A result whose divergence is a number."""

    def __init__(self, kl: float, result: Result):
        self.kl, self.reward, self.rewards, self.kls, self.seeds = kl, result.reward, result.rewards, result.kls, result.seeds


def kl_levels(largest: Sequence[float]) -> list[float]:
    """Divergences to compare at: some of 1, 2 and 5 times the powers of ten, up to the largest that two rows reach, or the one row that there is.

    They begin where the row that goes least far can still be compared, and at a tenth of the last at most.

    Args:
        largest: by row, its largest divergence.
    """
    reached = sorted((kl for kl in largest if kl > 0), reverse=True)
    if not reached:
        return []
    limit = reached[min(1, len(reached) - 1)]
    powers = range(math.floor(math.log10(limit / RANGE)), math.floor(math.log10(limit)) + 1)
    nice = [float(f"{first}e{power}") for power in powers for first in (1, 2, 5)]
    least = max(limit / RANGE, min(reached[-1], limit / 10))
    below = [level for level in nice if level <= least]
    kept = [level for level in nice if level <= limit and level >= (below[-1] if below else least)]
    # As evenly as the list allows.
    places = np.unique(np.linspace(0, len(kept) - 1, min(MOST_LEVELS, len(kept))).round().astype(int))
    return [kept[place] for place in places]


def the_control(rows: Sequence[Row]) -> Row | None:
    """The row of RE-Control that is shown in detail: the first of RE-Control alone, else the first that it is a part of; None without any."""
    alone = [row for row in rows if row.result.kind == ReControl.kind]
    part = [row for row in rows if ReControl.kind in row.result.kind.split(" + ")]
    return next(iter(alone + part), None)
