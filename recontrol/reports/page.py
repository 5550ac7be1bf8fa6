"""The report of a study as one HTML page that needs nothing beside it: no script, no network, figures and styles inside."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recontrol.methods.control import ReControl
from recontrol.reports.coloured import SHADES, coloured
from recontrol.reports.columns import COST, QUALITY, Cell, Column, cells, interval_digits, measured
from recontrol.reports.comparison import EqualKL, Row, sweep
from recontrol.reports.figures import calibration, frontier, resources, sweeps
from recontrol.reports.findings import Findings
from recontrol.reports.headline import facts, statements
from recontrol.training.diagnosis import Diagnosis

# Prompts whose responses are shown, the first ones.
EXAMPLES = 4
COLOURED = 3
# Methods whose V is drawn along responses, beside the uncontrolled model.
DRAWN = 4
# A longer prompt is folded up but for its end.
LONG_PROMPT = 600


@dataclass(frozen=True)
class Table:
    """A table with a line for each row of the report.

    Attributes:
        columns: what its columns are.
        lines: (name, setting, cells) of each row.
    """

    columns: list[Column]
    lines: list[tuple[str, str, list[Cell]]]


def make_table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of the columns that were measured.

    Args:
        columns: what may be shown.
        rows: of the report.
    """
    shown = measured(columns, rows)
    by_column = [cells(column, rows) for column in shown]
    return Table(shown, [(row.name, row.setting, [column[place] for column in by_column]) for place, row in enumerate(rows)])


def render(
    findings: Findings,
    rows: Sequence[Row],
    equal: EqualKL | None,
    diagnosis: Diagnosis | None,
    *,
    study: Mapping[str, Any],
    settings: str,
    command: str,
) -> str:
    """The page.

    Args:
        findings: what was found.
        rows: its rows.
        equal: the rows at equal divergence; None where that is not known.
        diagnosis: of V on the uncontrolled model's responses; None without V.
        study: the sections of the study, ready for JSON; empty where there is none.
        settings: the study as a YAML file has it; empty where there is none.
        command: that made the report; empty where it is not known.
    """
    base, groups = sweep(findings)
    return (
        _environment()
        .get_template("page.html")
        .render(
            facts=facts(findings, study),
            statements=statements(rows, equal),
            quality=make_table(QUALITY, rows),
            cost=make_table(COST, rows),
            equal=equal,
            level_cells=None if equal is None else _level_cells(equal),
            frontier=frontier(rows, base, groups),
            no_kl=[row.name for row in rows if row.result.kl is None],
            sweeps=sweeps(base, groups),
            calibration={} if diagnosis is None else calibration(diagnosis, _along(rows), rows),
            diagnosis=diagnosis,
            resources=resources(rows),
            coloured=coloured(rows, findings.prompts, COLOURED),
            shades=SHADES,
            examples=_examples(findings, rows),
            long_prompt=LONG_PROMPT,
            tried=_tried(findings),
            prompts=len(findings.prompts),
            seeds=findings.results[0].seeds,
            against=findings.against,
            glossary=[*measured(QUALITY, rows), *measured(COST, rows)],
            settings=settings,
            command=command,
        )
    )


@functools.cache
def _environment() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("recontrol.reports", "templates")
    # Texts of prompts and responses are anything at all; nothing that is not known is left blank.
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _examples(findings: Findings, rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """(prompt, [(name of the row, reward, response)]) of the first prompts with the first seed."""
    places = range(min(EXAMPLES, len(findings.prompts)))
    return [(findings.prompts[place], [(row.name, row.result.rewards[place], row.result.responses[place]) for row in rows]) for place in places]


def _along(rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    """V along the responses of the uncontrolled model and of the rows that RE-Control is part of."""
    controlled = [row for row in rows[1:] if ReControl.kind in row.result.kind and row.result.values]
    return {row.name: [along for along in row.result.values if along] for row in [rows[0], *controlled[:DRAWN]]}


def _level_cells(equal: EqualKL) -> dict[str, list[Cell]]:
    """By row, its reward at each level, and at the end its largest with the divergence that it takes.

    The largest reward of a level is marked where no other interval reaches into its own, and no row has more at a smaller divergence.
    """
    column = QUALITY[0]
    digits = interval_digits([entry.interval for entries in equal.rewards.values() for entry in entries if entry.interval])
    made: dict[str, list[Cell]] = {name: [] for name in equal.rewards}
    for place in range(len(equal.levels)):
        level = {name: entries[place] for name, entries in equal.rewards.items()}
        for name, entry in level.items():
            others = [other for other in level.values() if other is not entry and other.reward is not None]
            low = None if entry.interval is None else entry.interval[0]
            clear = low is not None and all(other.interval is not None and other.interval[1] < low for other in others)
            best = clear and bool(others) and not equal.better_before(place)
            made[name].append(Cell(entry.reward, column.write(entry.reward, digits), column.write_interval(entry.interval, digits), best))
    for name, (kl, reward) in equal.largest.items():
        made[name].append(Cell(reward, column.write(reward, digits), f"{kl:.3g} nats", False))
    return made


def _tried(findings: Findings) -> tuple[Table, list[bool]] | None:
    """The settings on validation prompts, and which were chosen; None where there was no choice to make."""
    if not findings.validation:
        return None
    chosen = {result.method for result in findings.results[1:]}
    places = [("uncontrolled", 0), *((name, place) for name, several in findings.groups.items() for place in several)]
    rows = [Row(name, findings.validation[place], None, None, None) for name, place in places]
    return make_table(TRIED, rows), [row.result.method in chosen for row in rows]


# What settings are chosen by, the paper's sum at the end; the best of many tries is not marked, since it may be the luckiest.
TRIED = (
    *(
        dataclasses.replace(column, responses=lambda row: None)
        for column in QUALITY
        if column.key in ("reward", "kl", "nll", "diversity", "coherence", "value_end")
    ),
    Column("score", "Sum", "", "", lambda row: (row.result.coherence or 0.0) + row.result.diversity + row.result.reward),
)
