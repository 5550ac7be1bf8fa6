"""The figures of a report as SVG inside its page: their text takes the page's colour and font, and nothing in them points elsewhere."""

import contextlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recontrol.checks import required
from recontrol.evaluation.results import Result
from recontrol.reports.comparison import Row
from recontrol.training.diagnosis import Diagnosis

# Okabe and Ito's palette, for readers who cannot tell red from green.
RED = "#D55E00"
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", RED)
MARKERS = "osD^vP"
# Stands for the page's own colour of text, which is another one in the dark.
INK = "#123456"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "grid.alpha": 0.18,
    "axes.grid": True,
    "lines.markersize": 4.5,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")},
    # Names may have a dollar in them.
    "text.parse_math": False,
    # Letters stay text: they can be searched and copied, and need no room.
    "svg.fonttype": "none",
}
# A wider span of settings is drawn on a logarithmic axis.
LOGARITHMIC = 8
# How far below the uncontrolled model a figure goes, in units of how far it goes above.
DEPTH = 0.5


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A figure of this size in inches, in the style of the page; `to_svg` must be called inside as well."""
    figures = required("matplotlib.figure", "report")
    with required("matplotlib", "report").rc_context(STYLE):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an element of a page; `name` is unique on it, and `description` is for readers who do not see the figure."""
    written = io.StringIO()
    with required("matplotlib", "report").rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("xlink:href=", "href=")
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    # Only the shape is kept of the size, so that the page says how large it is.
    box = text.split('viewBox="')[1].split('"')[0]
    opening = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def frontier(rows: Sequence[Row], base: Result, groups: Mapping[str, Sequence[Result]]) -> str | None:
    """Reward against KL: a line through each row's settings, and where the row came out on the test prompts; None where no row's KL is known."""
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
            kl = max(0.0, row.result.kl or 0.0)
            _mark(axis, kl, row, styles[row.name], xerr=None if row.result.kl_interval is None else _bars(kl, row.result.kl_interval))
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
    """By the name of each row with several settings: reward and V at the end, diversity and NLL against the setting."""
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
    """By their titles: mean reward against V, the correlation of both along responses, and V along the responses of some rows."""
    made: dict[str, str] = {}
    places = (np.arange(len(found.tokens)) + 0.5) / len(found.tokens)
    with drawing(3.6, 3.2) as figure:
        axis = figure.subplots()
        predicted, observed, _ = zip(*found.calibration, strict=True)
        # Where predicted and observed reward are the same.
        axis.axline((predicted[0], predicted[0]), slope=1, color=INK, linewidth=1, linestyle=":")
        axis.plot(predicted, observed, "-o", color=HUES[0])
        axis.set(xlabel="V, mean of a bin of tokens", ylabel="mean reward of their responses")
        listed = "; ".join(f"V {v:.3g}: reward {r:.3g}" for v, r, _ in found.calibration)
        made["Reliability"] = to_svg(figure, "reliability", f"Mean reward by bins of V, with the line where both are equal. {listed}.")
    with drawing(3.6, 3.2) as figure:
        axis = figure.subplots()
        axis.plot(places, np.array(found.correlation, dtype=float), "-o", color=HUES[0])
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


def _by_position(values: Sequence[Sequence[float]], bins: int) -> Any:
    """(bins,) means over the tokens at each relative position; NaN, which is not drawn, where there are none."""
    v = np.array([number for along in values for number in along], dtype=float)
    place = np.array([int((token + 0.5) / len(along) * bins) for along in values for token in range(len(along))], dtype=int)
    return np.array([v[place == number].mean() if (place == number).any() else np.nan for number in range(bins)])


def resources(rows: Sequence[Row]) -> str:
    """Reward against the time that a method adds to each token."""
    styles = _styles(rows)
    with drawing(7.2, 4.6) as figure:
        axis = figure.subplots()
        for row in rows:
            _mark(axis, row.result.added_seconds * 1000, row, styles[row.name])
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


def _mark(axis: Any, x: float, row: Row, style: tuple[str, str, str], **bars: Any) -> None:
    """The reward of a row with its interval."""
    colour, marker, _ = style
    bars["yerr"] = _bars(row.result.reward, row.result.reward_interval)
    axis.errorbar(x, row.result.reward, **bars, fmt=marker, color=colour, markersize=8, elinewidth=1, markeredgecolor=INK, label=row.name)


def _bars(middle: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]


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
