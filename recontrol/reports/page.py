"""The report as one HTML page that needs nothing beside it: no script, no network, figures and styles inside."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import yaml

from recontrol.checks import required
from recontrol.methods.control import ReControl
from recontrol.reports.columns import COST, QUALITY, Column, TableCell, interval_digits, measured
from recontrol.reports.comparison import EqualKL, Findings, Row, sweep
from recontrol.reports.figures import calibration, frontier, resources, sweeps
from recontrol.reports.table import rule_in_words
from recontrol.training.diagnosis import Diagnosis
from recontrol.version import __version__

# Prompts whose responses are shown, the first ones, and those of them whose tokens have the colour of V.
EXAMPLES, COLOURED = 4, 3
# Shades of colour on each side of the middle, and the share of the tokens whose V is inside the scale.
SHADES, INSIDE = 8, 0.98
# A longer prompt is folded up but for its end.
LONG_PROMPT = 600
# What settings are chosen by, the paper's sum at the end; the best of many tries is not marked, since it may be the luckiest.
TRIED = (
    *(replace(column, responses_path="") for column in QUALITY if column.key in ("reward", "kl", "nll", "diversity", "coherence", "value_end")),
    Column("score", "Sum", path="score"),
)


def make_table(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, Any]:
    """The `columns` that were measured, and a line (name, setting, cells) for each row."""
    shown = measured(columns, rows)
    by_column = [column.cells(rows) for column in shown]
    # A row that is called by its settings says them once.
    settings = ["" if row.setting and row.setting in row.name else row.setting for row in rows]
    return {"columns": shown, "lines": [(row.name, settings[place], [column[place] for column in by_column]) for place, row in enumerate(rows)]}


def render(findings: Findings, rows: Sequence[Row], equal: EqualKL | None, diagnosis: Diagnosis | None, study: Mapping[str, Any], command: str) -> str:
    """The page; `study` has its sections ready for YAML and is empty where there is none, `command` likewise."""
    base, groups = sweep(findings)
    threads = torch.get_num_threads()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    jinja2 = required("jinja2", "report")
    loader = jinja2.PackageLoader("recontrol.reports", "templates")
    # Prompts and responses may have any text in them; a name that is not known is an error.
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(
        study=study,
        rule=rule_in_words(study["choose"]) if study.get("choose") else "",
        made={"Made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **versions()},
        machine=f"{platform.system()} {platform.machine()}, {hardware}",
        quality=make_table(QUALITY, rows),
        cost=make_table(COST, rows),
        equal=equal,
        level_cells=equal and _level_cells(equal),
        frontier=frontier(rows, base, groups),
        sweeps=sweeps(base, groups),
        calibration={} if diagnosis is None else calibration(diagnosis, rows),
        diagnosis=diagnosis,
        resources=resources(rows),
        coloured=_coloured(rows, findings.prompts),
        shades=SHADES,
        examples=EXAMPLES,
        long_prompt=LONG_PROMPT,
        tried=_tried(findings),
        findings=findings,
        rows=rows,
        seeds=findings.results[0].seeds,
        glossary=measured((*QUALITY, *COST), rows),
        settings=as_yaml(study),
        command=command,
    )


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    return {"recontrol": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "Python": platform.python_version()}


def _coloured(rows: Sequence[Row], prompts: Sequence[str]) -> dict[str, Any] | None:
    """The first responses of the uncontrolled model and of RE-Control token by token, with V and its shade; None where V was not recorded."""
    # RE-Control alone, else the first row that it is a part of.
    controlled = sorted((row for row in rows[1:] if ReControl.kind in row.result.kind.split(" + ")), key=lambda row: row.result.kind != ReControl.kind)
    shown = [row for row in (rows[0], *controlled[:1]) if row.result.answers]
    places = [place for place in range(len(prompts)) if shown and all(_tokens(row, place) for row in shown)][:COLOURED]
    if not places:
        return None
    middle = rows[0].result.reward
    span = float(np.quantile([abs(value - middle) for row in shown for place in places for _, value in _tokens(row, place)], INSIDE)) or 1.0

    def shaded(row: Row, place: int) -> list[tuple[str, int, float]]:
        return [(text, round(max(-1.0, min(1.0, (value - middle) / span)) * SHADES), value) for text, value in _tokens(row, place) if text]

    responses = [(prompts[place], [(row.name, row.result.rewards[place], shaded(row, place)) for row in shown]) for place in places]
    return {"responses": responses, "middle": middle, "span": span}


def _tokens(row: Row, place: int) -> list[tuple[str, float]]:
    """Text and V of each token of a response; empty where they were not recorded."""
    pieces, values = row.result.answers[place].pieces or [], row.result.answers[place].values or []
    return list(zip(pieces, values, strict=True)) if len(pieces) == len(values) else []


def _level_cells(equal: EqualKL) -> dict[str, list[TableCell]]:
    """By row, its reward at each level, marked where no other interval reaches into its own and no row has more before, and its largest with its divergence."""
    column = QUALITY[0]
    digits = interval_digits([entry.interval for entries in equal.rewards.values() for entry in entries if entry.interval])
    made: dict[str, list[TableCell]] = {}
    for name, entries in equal.rewards.items():
        made[name] = []
        for place, entry in enumerate(entries):
            levels = (others[place] for other, others in equal.rewards.items() if other != name)
            others = [other.interval for other in levels if other.reward is not None]
            clear = entry.interval is not None and all(other is not None and other[1] < entry.interval[0] for other in others)
            made[name].append(column.cell(entry.reward, entry.interval, digits, clear and bool(others) and not equal.better_before(place)))
        kl, reward = equal.largest[name]
        made[name].append(TableCell(reward, column.write(reward, digits), f"{kl:.3g} nats", False))
    return made


def _tried(findings: Findings) -> tuple[dict[str, Any], list[bool]] | None:
    """The settings on validation prompts, and which were chosen; None where nothing was chosen."""
    if not findings.validation:
        return None
    places = [("uncontrolled", 0), *((name, place) for name, several in findings.groups.items() for place in several)]
    rows = [Row(name, findings.validation[place]) for name, place in places]
    return make_table(TRIED, rows), [row.result.method in findings.chosen for row in rows]


def as_yaml(study: Mapping[str, Any]) -> str:
    """As a study's file has it, without what is not set."""

    def given(content: Any) -> Any:
        if isinstance(content, Mapping):
            return {name: given(entry) for name, entry in content.items() if entry is not None}
        return [given(entry) for entry in content] if isinstance(content, list | tuple) else content

    return yaml.safe_dump(given(study), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None) if study else ""
