"""The figures of a study's report, each as SVG: reward against divergence, settings along a sweep, the calibration of V, reward against time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recontrol.evaluation.results import Result
from recontrol.reports.comparison import Row
from recontrol.reports.svg import COLOURS, INK, RED, drawing, to_svg
from recontrol.training.diagnosis import Diagnosis

MARKERS = "osD^vP"
HUES = (*COLOURS, RED)
# A wider span of settings is drawn on a logarithmic axis.
LOGARITHMIC = 8
# How far below the uncontrolled model a figure goes, in units of how far it goes above.
DEPTH = 0.5


def frontier(rows: Sequence[Row], base: Result, groups: Mapping[str, Sequence[Result]]) -> str | None:
    """Reward against KL: a line through each row's settings, and where the row came out on the test prompts; None where no row's KL is known.

    Args:
        rows: of the report.
        base: the uncontrolled model on the prompts of the sweep.
        groups: by the name of a row, its settings in the sweep.
    """
    styles = _styles(rows)
    shown = [row for row in rows if row.result.kl is not None and row.gain is not None]
    if not shown:
        return None
    with drawing(7.2, 5.2) as figure:
        axis = figure.subplots()
        largest = 0.0
        for name, points in groups.items():
            known = sorted((point.kl, point.reward) for point in points if point.kl is not None)
            if len(known) > 1:
                colour, marker, line = styles.get(name, (INK, "o", "-"))
                kls, rewards = zip(*((max(0.0, kl), reward) for kl, reward in [(0.0, base.reward), *known]), strict=True)
                axis.plot(kls, rewards, line, color=colour, marker=marker, markersize=3, linewidth=1.1, alpha=0.75)
                largest = max(largest, kls[-1])
        for row in shown:
            result = row.result
            colour, marker, _ = styles[row.name]
            kl = max(0.0, result.kl or 0.0)
            low, high = result.reward_interval
            sides = None if result.kl_interval is None else [[max(0.0, kl - result.kl_interval[0])], [max(0.0, result.kl_interval[1] - kl)]]
            bars = {"yerr": [[max(0.0, result.reward - low)], [max(0.0, high - result.reward)]], "xerr": sides}
            axis.errorbar(kl, result.reward, **bars, fmt=marker, color=colour, markersize=8, elinewidth=1, markeredgecolor=INK, label=row.name)
            largest = max(largest, kl)
        axis.axhline(base.reward, color=INK, linestyle=":", linewidth=1)
        axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axis.set_xticks(*_ticks(largest))
        # A setting that ruins the model must not press all others together.
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, base.reward - DEPTH * max(high - base.reward, 0.1 * (high - low))), high)
        axis.set(xlim=(0, largest * 1.1 or 1), xlabel="KL to the uncontrolled model, nats a response (square-root axis)", ylabel="reward")
        figure.legend(loc="outside lower center", ncols=_legend_columns(shown))
        listed = "; ".join(f"{row.name}: KL {row.result.kl:.3g}, reward {row.result.reward:.3g}" for row in shown)
        return to_svg(figure, "frontier", f"Reward against divergence. On the test prompts: {listed}. The uncontrolled model: {base.reward:.3g}.")


def sweeps(base: Result, groups: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """By the name of each row with several settings: reward and V at the end, diversity and NLL against the setting.

    Args:
        base: the uncontrolled model.
        groups: by the name of a row, its settings.
    """
    made: dict[str, str] = {}
    for name, points in groups.items():
        setting = _main_setting(points)
        if setting is not None:
            made[name] = _sweep(f"sweep-{len(made)}", name, setting, base, points)
    return made


def _sweep(mark: str, name: str, setting: str, base: Result, points: Sequence[Result]) -> str:
    lines: dict[str, list[Result]] = {}
    for point in sorted(points, key=lambda point: point.settings[setting]):
        others = ", ".join(f"{other} {given}" for other, given in point.settings.items() if other != setting)
        lines.setdefault(others, []).append(point)
    sizes = sorted({point.settings[setting] for point in points})
    with drawing(3.6, 5.2) as figure:
        reward, diversity, nll = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
        for number, (others, line) in enumerate(lines.items()):
            colour, x = HUES[number % len(HUES)], [point.settings[setting] for point in line]
            label = f" ({others})" if len(lines) > 1 else ""
            reward.plot(x, [point.reward for point in line], "-o", color=colour, label=f"reward{label}")
            reward.fill_between(x, *zip(*(point.reward_interval for point in line), strict=True), color=colour, alpha=0.18, linewidth=0)
            if all(point.value_end is not None for point in line):
                reward.plot(x, [point.value_end for point in line], "--s", color=RED if len(lines) == 1 else colour, label=f"V at the end{label}")
            diversity.plot(x, [point.diversity for point in line], "-o", color=colour)
            if all(point.nll is not None for point in line):
                nll.plot(x, [point.nll for point in line], "-o", color=colour)
        for axis, level in ((reward, base.reward), (diversity, base.diversity), (nll, base.nll)):
            if level is not None:
                axis.axhline(level, color=INK, linestyle=":", linewidth=1, label="uncontrolled" if axis is reward else None)
        if sizes[0] > 0 and sizes[-1] / sizes[0] >= LOGARITHMIC:
            nll.set_xscale("log")
        nll.set_xticks(sizes, [f"{size:g}" for size in sizes])
        nll.minorticks_off()
        reward.set_ylabel("reward")
        diversity.set_ylabel("diversity")
        nll.set(ylabel="NLL", xlabel=setting)
        figure.align_ylabels()
        figure.legend(loc="outside lower center", ncols=1 if len(lines) > 1 else 3, fontsize=8.5, handlelength=1.6, columnspacing=1)
        listed = "; ".join(f"{setting} {point.settings[setting]:g}: reward {point.reward:.3g}, {_prediction(point)}" for point in points)
        return to_svg(figure, mark, f"{name} along {setting}. {listed}.")


def _prediction(point: Result) -> str:
    return "V unknown" if point.value_end is None else f"V {point.value_end:.3g}"


def _main_setting(points: Sequence[Result]) -> str | None:
    """The number that differs most among the settings; None where there is none."""
    counts: dict[str, set[float]] = {}
    for point in points:
        for name, given in point.settings.items():
            if isinstance(given, int | float) and not isinstance(given, bool):
                counts.setdefault(name, set()).add(given)
    shared = {name: len(found) for name, found in counts.items() if len(found) > 1 and all(name in point.settings for point in points)}
    return max(shared, key=lambda name: shared[name], default=None)


def calibration(found: Diagnosis, along: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[Row]) -> dict[str, str]:
    """By their titles: mean reward against V, the correlation of both along responses, and V along the responses of some rows.

    Args:
        found: of the uncontrolled model's responses.
        along: by the name of a row, V for each token of its responses.
        rows: of the report, for their colours.
    """
    made: dict[str, str] = {}
    with drawing(3.6, 3.2) as figure:
        axis = figure.subplots()
        predicted, observed, _ = zip(*found.calibration, strict=True)
        # Where predicted and observed reward are the same.
        axis.axline((predicted[0], predicted[0]), slope=1, color=INK, linewidth=1, linestyle=":")
        axis.plot(predicted, observed, "-o", color=COLOURS[0])
        axis.set(xlabel="V, mean of a bin of tokens", ylabel="mean reward of their responses")
        listed = "; ".join(f"V {v:.3g}: reward {r:.3g}" for v, r, _ in found.calibration)
        made["Reliability"] = to_svg(figure, "reliability", f"Mean reward by bins of V, with the line where both are equal. {listed}.")
    with drawing(3.6, 3.2) as figure:
        axis = figure.subplots()
        places = _places(len(found.tokens))
        axis.plot(places, np.array(found.correlation, dtype=float), "-o", color=COLOURS[0])
        axis.axhline(0, color=INK, linewidth=1, linestyle=":")
        axis.set(
            xlabel="position in the response",
            ylabel="correlation of V and reward",
            ylim=(min([-0.05, *(number - 0.05 for number in found.correlation if number is not None)]), 1),
            xlim=(0, 1),
        )
        listed = ", ".join("unknown" if number is None else f"{number:.2f}" for number in found.correlation)
        made["What V knows along the response"] = to_svg(figure, "correlation", f"Correlation of V with the final reward along the response: {listed}.")
    with drawing(3.6, 3.2) as figure:
        axis = figure.subplots()
        styles = _styles(rows)
        for name, values in along.items():
            colour, marker, line = styles[name]
            axis.plot(places, _by_position(values, len(places)), line, marker=marker, color=colour, label=name)
        axis.set(xlabel="position in the response", ylabel="V, mean over responses", xlim=(0, 1))
        figure.legend(loc="outside lower center", fontsize=8.5)
        made["V along responses, by method"] = to_svg(figure, "along", f"Mean of V along responses of {', '.join(along)}.")
    return made


def _places(bins: int) -> Any:
    return (np.arange(bins) + 0.5) / bins


def _by_position(values: Sequence[Sequence[float]], bins: int) -> Any:
    """(bins,) means over the tokens at each relative position; NaN, which is not drawn, where there are none."""
    v = np.array([number for along in values for number in along], dtype=float)
    place = np.array([int((token + 0.5) / len(along) * bins) for along in values for token in range(len(along))], dtype=int)
    return np.array([v[place == number].mean() if (place == number).any() else np.nan for number in range(bins)])


def resources(rows: Sequence[Row]) -> str:
    """Reward against the time that a method adds to each token.

    Args:
        rows: of the report.
    """
    styles = _styles(rows)
    with drawing(7.2, 4.6) as figure:
        axis = figure.subplots()
        for row in rows:
            result = row.result
            colour, marker, _ = styles[row.name]
            low, high = result.reward_interval
            bars = [[max(0.0, result.reward - low)], [max(0.0, high - result.reward)]]
            axis.errorbar(result.added_seconds * 1000, result.reward, yerr=bars, fmt=marker, color=colour, markersize=8, markeredgecolor=INK, label=row.name)
        # Noise may make a method that adds nothing look faster than the model.
        axis.set_xscale("function", functions=(lambda time: np.sign(time) * np.sqrt(np.abs(time)), lambda root: np.sign(root) * np.square(root)))
        times = [row.result.added_seconds * 1000 for row in rows]
        axis.set_xticks(*_ticks(max(times)))
        axis.set(
            xlim=(min(-max(times) / 400, 1.2 * min(times)), max(times) * 1.1 or 1), xlabel="time added to each token, ms (square-root axis)", ylabel="reward"
        )
        figure.legend(loc="outside lower center", ncols=_legend_columns(rows))
        listed = "; ".join(f"{row.name}: {row.result.added_seconds * 1000:.3g} ms, reward {row.result.reward:.3g}" for row in rows)
        return to_svg(figure, "resources", f"Reward against the time added to each token. {listed}.")


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """(colour, marker, line) by name: the same in all figures; the uncontrolled model has the page's colour."""
    styles = {rows[0].name: (INK, "X", "-")}
    for number, row in enumerate(rows[1:]):
        turn = number // len(HUES)
        styles[row.name] = (HUES[number % len(HUES)], MARKERS[(number + turn) % len(MARKERS)], ("-", "--", ":")[turn % 3])
    return styles


def _legend_columns(rows: Sequence[Row]) -> int:
    """As many as the width of a large figure has room for."""
    return max(1, min(3, 72 // (max(len(row.name) for row in rows) + 4)))


def _ticks(largest: float) -> tuple[list[float], list[str]]:
    """Places that are wide enough apart where the axis grows with the square root."""
    step = 10 ** np.floor(np.log10(largest)) if largest > 0 else 1.0
    places = [0.0, *(place for place in (step / 10, step / 2, step, 2 * step, 3.5 * step, 5 * step, 7.5 * step) if place <= largest * 1.05)]
    return places, [f"{place:g}" for place in places]
