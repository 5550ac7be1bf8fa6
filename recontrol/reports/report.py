"""The report of an evaluation of step sizes: a table in plain text, a JSON file, the responses as lines, and a figure."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recontrol.evaluation.results import Result
from recontrol.files import write_aside
from recontrol.reports.report_files import save_content, save_responses, summary
from recontrol.reports.svg import COLOURS, RED

HEADER = ("setting", "reward", "95 % interval", "diversity", "coherence", "NLL", "length", "tokens/s", "cost", "|edit|")
# Responses whose V is drawn; more lines cannot be told apart.
DRAWN_TRACES = 3


def table(results: Sequence[Result], chosen: tuple[float, int] | None = None) -> str:
    """The results as aligned plain text of at most 120 columns, with a line on what the columns mean.

    Args:
        results: from `evaluate`.
        chosen: the (step_size, steps) to mark with a star.
    """
    rows = [HEADER]
    for result in results:
        low, high = result.reward_interval
        rows.append(
            (
                result.method + (" *" if result.setting == chosen else ""),
                f"{result.reward:.3f}",
                f"[{low:.3f}, {high:.3f}]",
                f"{result.diversity:.3f}",
                _number(result.coherence, ".3f"),
                _number(result.nll, ".2f"),
                f"{result.length:.1f}",
                f"{result.tokens_per_second:.0f}" if result.tokens_per_second >= 100 else f"{result.tokens_per_second:.1f}",
                f"{result.cost:.2f}x",
                _number(result.edit_norm, ".2f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    note = (
        "alpha: step size, n: steps. NLL: nats a token under the uncontrolled model. length: tokens a response. "
        "cost: time of a decode step over the uncontrolled one's. |edit|: mean norm."
    )
    if chosen is not None and any(result.setting == chosen for result in results):
        note += "\n* chosen: the largest coherence + diversity + reward."
    return "\n".join([*lines, *_wrapped(note)])


def save_report(
    out: str | os.PathLike,
    results: Sequence[Result],
    prompts: Sequence[str],
    *,
    chosen: tuple[float, int] | None = None,
    validation: Sequence[Result] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write `report.json`, `report.png` and `responses.jsonl` into a folder, each whole or not at all.

    Args:
        out: the folder, made if absent.
        results: from `evaluate`.
        prompts: the prompts that were evaluated.
        chosen: the (step_size, steps) that was chosen, marked in the figure.
        validation: the results on validation prompts that it was chosen by.
        about: what else belongs in the report, ready for JSON: names of the model, the data, the reward model, sizes.

    Raises:
        ValueError: a result has another number of responses than prompts and seeds.
        OSError: the folder cannot be written.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_responses(folder / "responses.jsonl", results, prompts)
    plot(results, folder / "report.png", chosen=chosen)
    content = {
        "about": about or {},
        "chosen": None if chosen is None else {"step_size": chosen[0], "steps": chosen[1]},
        "results": [summary(result, results[0]) for result in results],
        "validation": None if validation is None else [summary(result, validation[0]) for result in validation],
    }
    save_content(folder / "report.json", content)


def plot(results: Sequence[Result], path: str | os.PathLike, *, chosen: tuple[float, int] | None = None) -> None:
    """Draw reward, diversity and negative log-likelihood against the step size, and V along a few responses, as PNG.

    Args:
        results: from `evaluate`; the uncontrolled model is a dashed line.
        path: the file.
        chosen: the (step_size, steps) to mark; its V is drawn beside that of the uncontrolled model.

    Raises:
        OSError: the file cannot be written.
    """
    with write_aside(path) as aside:
        draw(results, chosen).savefig(aside, format="png", dpi=130)


def draw(results: Sequence[Result], chosen: tuple[float, int] | None = None) -> Any:
    """The figure that `plot` saves, as a `matplotlib.figure.Figure`.

    Args:
        results: from `evaluate`.
        chosen: the (step_size, steps) to mark.
    """
    from matplotlib.figure import Figure

    # Not pyplot, which would choose a backend for the whole process and keep the figure; a bare one draws with Agg.
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    _sweep(axes[0], results, "reward", "Reward (band: 95 % interval)", chosen, band=True)
    _sweep(axes[1], results, "diversity", "Diversity", chosen)
    _sweep(axes[2], results, "nll", "NLL, nats a token, uncontrolled model", chosen)
    _trace_panel(axes[3], results, chosen)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
    return figure


def _sweep(axis: Any, results: Sequence[Result], name: str, title: str, chosen: tuple[float, int] | None, band: bool = False) -> None:
    """One measure against the step size, a line for each number of steps."""
    for result in results:
        if not result.steps and getattr(result, name) is not None:
            axis.axhline(getattr(result, name), color="0.35", linestyle="--", label="uncontrolled")
            if band:
                axis.axhspan(*result.reward_interval, color="0.35", alpha=0.12, linewidth=0)
    controlled = [result for result in results if result.steps and getattr(result, name) is not None]
    for number, steps in enumerate(sorted({result.steps for result in controlled})):
        line = sorted((result for result in controlled if result.steps == steps), key=lambda result: result.step_size)
        x, colour = [result.step_size for result in line], COLOURS[number % len(COLOURS)]
        axis.plot(x, [getattr(result, name) for result in line], marker="o", color=colour, label=f"{steps} steps")
        if band:
            axis.fill_between(x, *zip(*(result.reward_interval for result in line), strict=True), color=colour, alpha=0.18, linewidth=0)
    for result in controlled:
        if result.setting == chosen:
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": RED, "markeredgewidth": 2, "linestyle": "none"}
            axis.plot(result.step_size, getattr(result, name), "o", label="chosen", **ring)
    sizes = sorted({result.step_size for result in controlled})
    if sizes:
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
    axis.set(title=title, xlabel="step size alpha")
    axis.grid(alpha=0.25)


def _trace_panel(axis: Any, results: Sequence[Result], chosen: tuple[float, int] | None) -> None:
    """V along the first responses, without control and with the chosen setting (else the first)."""
    controlled = next((result for result in results if result.steps and chosen in (None, result.setting)), None)
    base = next((result for result in results if not result.steps), None)
    for result, colour, style, name in ((base, "0.35", "--", "uncontrolled"), (controlled, COLOURS[0], "-", "controlled")):
        for number, trace in enumerate(result.values[:DRAWN_TRACES] if result else []):
            axis.plot(range(len(trace)), trace, style, color=colour, alpha=1 - 0.25 * number, linewidth=1.3, label=name if number == 0 else None)
    title = "V of the state read for each token, before its edit"
    axis.set(title=title if axis.lines else "V was not recorded", xlabel="token of the response", ylabel="V, predicted final reward")
    if axis.lines:
        axis.legend(frameon=False)
    axis.grid(alpha=0.25)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _wrapped(text: str, width: int = 120) -> list[str]:
    import textwrap

    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)]
