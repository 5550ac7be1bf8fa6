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
from recontrol.methods.control import ReControl
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
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "grid.alpha": 0.18,
    "axes.grid": True,
    "lines.markersize": 4.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    # Names may have a dollar in them.
    "text.parse_math": False,
    # Letters stay text: they can be searched and copied, and need no room.
    "svg.fonttype": "none",
}
# A wider span of settings is drawn on a logarithmic axis; the V of so many methods along responses.
LOGARITHMIC, DRAWN = 8, 4
# How far below the uncontrolled model a figure goes, in units of how far it goes above.
DEPTH = 0.5
DOTTED: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1}
LEGEND: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8.5}


@contextlib.contextmanager
def drawing(width: float, height: float, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """A figure of this size in inches and its axes, in the style of the page; `to_svg` must be called inside as well."""
    with required("matplotlib", "report").rc_context(STYLE):
        figure = required("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**subplots)


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an element of a page; `name` is unique on it, and `description` is for readers who do not see the figure."""
    written = io.StringIO()
    with required("matplotlib", "report").rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    _, _, text = written.getvalue().replace(INK, "currentColor").replace("xlink:href=", "href=").partition("<svg")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # What is pointed at is named by its content and the salt; other names are those of every figure.
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    # Only the shape is kept of the size, so that the page says how large it is.
    box = re.findall('viewBox="([^"]+)', text)[0]
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(description)}">{text[text.index(">") + 1 :].strip()}'


def frontier(rows: Sequence[Row], base: Result, groups: Mapping[str, Sequence[Result]]) -> str | None:
    """Reward against KL: a line through each row's settings, and where the row came out on the test prompts; None where no row's KL is known."""
    styles = _styles(rows)
    shown = [row for row in rows if row.result.kl is not None and row.gain is not None]
    if not shown:
        return None
    with drawing(7.2, 5.2) as (figure, axis):
        largest = max(0.0, *(row.result.kl or 0.0 for row in shown))
        for name, points in groups.items():
            known = sorted((max(0.0, point.kl), point.reward) for point in points if point.kl is not None)
            if len(known) > 1:
                colour, marker, line = styles.get(name, (INK, "o", "-"))
                axis.plot(*zip((0.0, base.reward), *known, strict=True), line, color=colour, marker=marker, markersize=3, linewidth=1.1, alpha=0.75)
                largest = max(largest, known[-1][0])
        for row in shown:
            kl = max(0.0, row.result.kl or 0.0)
            _mark(axis, kl, row, styles[row.name], xerr=row.result.kl_interval and _bars(kl, row.result.kl_interval))
        axis.axhline(base.reward, **DOTTED)
        _root_axis(figure, axis, shown, largest, "KL to the uncontrolled model, nats a response")
        # A setting that ruins the model must not press all others together.
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, base.reward - DEPTH * max(high - base.reward, 0.1 * (high - low))), high)
        axis.set_xlim(0, largest * 1.1 or 1)
        listed = "; ".join(f"{row.name}: KL {row.result.kl:.3g}, reward {row.result.reward:.3g}" for row in shown)
        return to_svg(figure, "frontier", f"Reward against divergence. On the test prompts: {listed}. The uncontrolled model: {base.reward:.3g}.")


def resources(rows: Sequence[Row]) -> str:
    """Reward against the time that a method adds to each token."""
    styles, times = _styles(rows), [row.result.added_seconds * 1000 for row in rows]
    with drawing(7.2, 4.6) as (figure, axis):
        for row, time in zip(rows, times, strict=True):
            _mark(axis, time, row, styles[row.name])
        _root_axis(figure, axis, rows, max(times), "time added to each token, ms")
        axis.set_xlim(min(-max(times) / 400, 1.2 * min(times)), max(times) * 1.1 or 1)
        listed = "; ".join(f"{row.name}: {time:.3g} ms, reward {row.result.reward:.3g}" for row, time in zip(rows, times, strict=True))
        return to_svg(figure, "resources", f"Reward against the time added to each token. {listed}.")


def sweeps(base: Result, groups: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """By the name of each row with several settings: reward and V at the end, diversity and NLL against the setting."""
    main = {name: setting for name, points in groups.items() if (setting := _main_setting(points)) is not None}
    return {name: _sweep(f"sweep-{number}", name, setting, base, groups[name]) for number, (name, setting) in enumerate(main.items())}


def _sweep(mark: str, name: str, setting: str, base: Result, points: Sequence[Result]) -> str:
    lines: dict[str, list[Result]] = {}
    for point in sorted(points, key=lambda point: point.settings[setting]):
        others = ", ".join(f"{other} {given}" for other, given in point.settings.items() if other != setting)
        lines.setdefault(others, []).append(point)
    sizes = sorted({point.settings[setting] for point in points})
    with drawing(3.6, 5.2, nrows=3, sharex=True, height_ratios=[2, 1, 1]) as (figure, three):
        axes = dict(zip(("reward", "diversity", "nll"), three, strict=True))
        for number, (others, line) in enumerate(lines.items()):
            x, several = [point.settings[setting] for point in line], len(lines) > 1
            colour, label = HUES[number % len(HUES)], f" ({others})" if several else ""
            for measure, axis in axes.items():
                if all(getattr(point, measure) is not None for point in line):
                    axis.plot(x, [getattr(point, measure) for point in line], "-o", color=colour, label=f"reward{label}" if measure == "reward" else None)
            axes["reward"].fill_between(x, *zip(*(point.reward_interval for point in line), strict=True), color=colour, alpha=0.18, linewidth=0)
            if all(point.value_end is not None for point in line):
                axes["reward"].plot(x, [point.value_end for point in line], "--s", color=colour if several else RED, label=f"V at the end{label}")
        for measure, axis in axes.items():
            axis.set_ylabel("NLL" if measure == "nll" else measure)
            if getattr(base, measure) is not None:
                axis.axhline(getattr(base, measure), **DOTTED, label="uncontrolled" if measure == "reward" else None)
        if sizes[0] > 0 and sizes[-1] / sizes[0] >= LOGARITHMIC:
            axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel(setting)
        figure.align_ylabels()
        figure.legend(**LEGEND, ncols=1 if len(lines) > 1 else 3, handlelength=1.6, columnspacing=1)
        values = ["unknown" if point.value_end is None else f"{point.value_end:.3g}" for point in points]
        listed = [f"{setting} {point.settings[setting]:g}: reward {point.reward:.3g}, V {v}" for point, v in zip(points, values, strict=True)]
        return to_svg(figure, mark, f"{name} along {setting}. {'; '.join(listed)}.")


def _main_setting(points: Sequence[Result]) -> str | None:
    """The number that differs most among the settings; None where there is none."""
    shared = [name for name in points[0].settings if all(name in point.settings for point in points)] if points else []
    numbers = {name: {point.settings[name] for point in points if type(point.settings[name]) in (int, float)} for name in shared}
    return max((name for name in shared if len(numbers[name]) > 1), key=lambda name: len(numbers[name]), default=None)


def calibration(found: Diagnosis, rows: Sequence[Row]) -> dict[str, str]:
    """By their titles: mean reward against V, the correlation of both along responses, and V along the responses of RE-Control's rows."""
    bins, styles = len(found.tokens), _styles(rows)
    places = (np.arange(bins) + 0.5) / bins
    with drawing(3.6, 3.2) as (figure, axis):
        predicted, observed, _ = zip(*found.calibration, strict=True)
        axis.plot(predicted, observed, "-o", color=HUES[0])
        axis.axline((predicted[0], predicted[0]), slope=1, **DOTTED)
        axis.set(xlabel="V, mean of a bin of tokens", ylabel="mean reward of their responses")
        listed = "; ".join(f"V {v:.3g}: reward {r:.3g}" for v, r, _ in found.calibration)
        reliability = to_svg(figure, "reliability", f"Mean reward by bins of V, with the line where both are equal. {listed}.")
    with drawing(3.6, 3.2) as (figure, axis):
        axis.plot(places, np.array(found.correlation, dtype=float), "-o", color=HUES[0])
        axis.axhline(0, **DOTTED)
        axis.set(xlabel="position in the response", ylabel="correlation of V and reward", xlim=(0, 1), ylim=(min(-0.05, axis.get_ylim()[0]), 1))
        listed = ", ".join("unknown" if number is None else f"{number:.2f}" for number in found.correlation)
        correlation = to_svg(figure, "correlation", f"Correlation of V with the final reward along the response: {listed}.")
    with drawing(3.6, 3.2) as (figure, axis):
        shown = [rows[0], *[row for row in rows[1:] if ReControl.kind in row.result.kind and row.result.values][:DRAWN]]
        for row in shown:
            colour, marker, line = styles[row.name]
            axis.plot(places, _by_position(row.result.values, bins), line, marker=marker, color=colour, label=row.name)
        axis.set(xlabel="position in the response", ylabel="V, mean over responses", xlim=(0, 1))
        figure.legend(**LEGEND)
        along = to_svg(figure, "along", f"Mean of V along responses of {', '.join(row.name for row in shown)}.")
    return {"Reliability": reliability, "What V knows along the response": correlation, "V along responses, by method": along}


def _by_position(values: Sequence[Sequence[float]], bins: int) -> Any:
    """(bins,) means over the tokens at each relative position; NaN, which is not drawn, where there are none."""
    v = [number for along in values for number in along]
    places = [int((token + 0.5) / len(along) * bins) for along in values for token in range(len(along))]
    counts = np.bincount(places, minlength=bins)
    return np.where(counts > 0, np.bincount(places, v, minlength=bins) / np.maximum(counts, 1), np.nan)


def _mark(axis: Any, x: float, row: Row, style: tuple[str, str, str], **bars: Any) -> None:
    """The reward of a row with its interval."""
    bars["yerr"] = _bars(row.result.reward, row.result.reward_interval)
    axis.errorbar(x, row.result.reward, **bars, fmt=style[1], color=style[0], markersize=8, elinewidth=1, markeredgecolor=INK, label=row.name)


def _bars(middle: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]


def _root_axis(figure: Any, axis: Any, rows: Sequence[Row], largest: float, label: str) -> None:
    """X grows with the square root, and below 0 likewise: noise may make a method that adds nothing look faster than the model. Rows are in the legend."""
    axis.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda root: np.sign(root) * np.square(root)))
    step = 10 ** np.floor(np.log10(largest)) if largest > 0 else 1.0
    places = [step * part for part in (0, 0.1, 0.5, 1, 2, 3.5, 5, 7.5) if step * part <= max(0.0, largest) * 1.05]
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set(xlabel=f"{label} (square-root axis)", ylabel="reward")
    # As many columns as there is room for.
    figure.legend(loc="outside lower center", ncols=max(1, min(3, 72 // (max(len(row.name) for row in rows) + 4))))


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """(colour, marker, line) by name: the same in all figures; the uncontrolled model has the page's colour."""
    styles = {rows[0].name: (INK, "X", "-")}
    for number, row in enumerate(rows[1:]):
        turn = number // len(HUES)
        styles[row.name] = (HUES[number % len(HUES)], MARKERS[(number + turn) % len(MARKERS)], ("-", "--", ":")[turn % 3])
    return styles
