"""The report as one HTML page that needs nothing beside it: no script, no network, figures and styles inside."""

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import yaml

from recontrol.checks import required
from recontrol.evaluation.measure import Answer
from recontrol.methods.control import ReControl
from recontrol.reports.columns import COST, QUALITY, Column, TableCell, cells, interval_digits, measured
from recontrol.reports.comparison import EqualKL, Findings, Row, sweep, the_control
from recontrol.reports.figures import calibration, frontier, resources, sweeps
from recontrol.reports.table import rule_in_words
from recontrol.training.diagnosis import Diagnosis
from recontrol.version import __version__

# Prompts whose responses are shown, the first ones, and those of them whose tokens have the colour of V.
EXAMPLES, COLOURED = 4, 3
# Shades of colour on each side of the middle, and the share of the tokens whose V is inside the scale.
SHADES, INSIDE = 8, 0.98
# Methods whose V is drawn along responses, beside the uncontrolled model.
DRAWN = 4
# A longer prompt is folded up but for its end.
LONG_PROMPT = 600
# What settings are chosen by, the paper's sum at the end; the best of many tries is not marked, since it may be the luckiest.
TRIED = (
    *(
        dataclasses.replace(column, responses=lambda row: None)
        for column in QUALITY
        if column.key in ("reward", "kl", "nll", "diversity", "coherence", "value_end")
    ),
    Column("score", "Sum", "", "", lambda row: (row.result.coherence or 0.0) + row.result.diversity + row.result.reward),
)


@dataclass(frozen=True)
class Table:
    """A table with a line (name, setting, cells) for each row of the report."""

    columns: list[Column]
    lines: list[tuple[str, str, list[TableCell]]]


def make_table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of the columns that were measured."""
    shown = measured(columns, rows)
    by_column = [cells(column, rows) for column in shown]
    # A row that is called by its settings says them once.
    settings = ["" if row.setting and row.setting in row.name else row.setting for row in rows]
    return Table(shown, [(row.name, settings[place], [column[place] for column in by_column]) for place, row in enumerate(rows)])


def render(findings: Findings, rows: Sequence[Row], equal: EqualKL | None, diagnosis: Diagnosis | None, study: Mapping[str, Any], command: str) -> str:
    """The page; `study` has its sections ready for YAML and is empty where there is none, `command` likewise."""
    base, groups = sweep(findings)
    return _template().render(
        facts=_facts(findings, study),
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
        coloured=_coloured(rows, findings.prompts),
        shades=SHADES,
        examples=[(prompt, [(row.name, row.result.rewards[place], row.result.responses[place]) for row in rows]) for place, prompt in _first(findings)],
        long_prompt=LONG_PROMPT,
        tried=_tried(findings),
        prompts=len(findings.prompts),
        seeds=findings.results[0].seeds,
        against=findings.against,
        glossary=[*measured(QUALITY, rows), *measured(COST, rows)],
        settings=as_yaml(study),
        command=command,
    )


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    return {"recontrol": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "Python": platform.python_version()}


@functools.cache
def _template() -> Any:
    jinja2 = required("jinja2", "report")
    loader = jinja2.PackageLoader("recontrol.reports", "templates")
    # Prompts and responses may have any text in them; a name that is not known is an error.
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html")


def _facts(findings: Findings, study: Mapping[str, Any]) -> dict[str, str]:
    """What was compared, by name; the rest of the settings are in the study at the end of the page."""
    model, prompts, reward, wins, decoding = (study.get(name) or {} for name in ("model", "prompts", "reward", "wins", "generation"))
    seeds, threads = findings.results[0].seeds, torch.get_num_threads()
    count = f"{len(findings.prompts)} prompts, {seeds} seed{'s' if seeds > 1 else ''}"
    length = f"at most {decoding['max_new_tokens']} tokens" if decoding else ""
    rule = rule_in_words(study["choose"]) if study.get("choose") else ""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    found = {
        "Language model": _listed(model.get("name"), model.get("revision"), f"weights in {model['dtype']}" if model else ""),
        "Test prompts": _listed(*_source(prompts.get("test")), count),
        "Reward": _listed(*reward.get("names", []), f"weights {reward['head_weights']}" if reward.get("head_weights") else ""),
        "Value function": study.get("value") or ("trained for this study" if study else ""),
        "Decoding": _listed(length, *(f"{name} {option}" for name, option in decoding.get("options", {}).items())),
        "Settings chosen": "on " + _listed(*_source(prompts.get("validation")), rule) if findings.validation and prompts else "",
        "Win rate": _listed(f"judged by {wins['judge']}" if wins else "", f"against {findings.against}") if findings.against else "",
        "Made": _listed(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", *(f"{name} {number}" for name, number in versions().items())),
        "Machine": f"{platform.system()} {platform.machine()}, {machine}",
    }
    return {name: text for name, text in found.items() if text}


def _listed(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _source(section: Mapping[str, Any] | None) -> list[str]:
    """Data set, split and limit."""
    if not section:
        return []
    is_file = str(section["source"]).endswith((".jsonl", ".json"))
    return [
        str(section["source"]),
        "" if is_file else f"split {section.get('split', 'train')}",
        f"the first {section['limit']}" if section.get("limit") else "",
    ]


def _first(findings: Findings) -> list[tuple[int, str]]:
    return list(enumerate(findings.prompts[:EXAMPLES]))


def _along(rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    """V along the responses of the uncontrolled model and of the rows that RE-Control is part of."""
    controlled = [row for row in rows[1:] if ReControl.kind in row.result.kind and row.result.values]
    return {row.name: [along for along in row.result.values if along] for row in [rows[0], *controlled[:DRAWN]]}


def _coloured(rows: Sequence[Row], prompts: Sequence[str]) -> dict[str, Any] | None:
    """The first responses of the uncontrolled model and of RE-Control token by token, with V and its shade; None where V was not recorded."""
    control = the_control(rows[1:])
    shown = [row for row in (rows[0], control) if row is not None and row.result.answers]
    places = [place for place in range(len(prompts)) if shown and all(_has_pieces(row.result.answers[place]) for row in shown)][:COLOURED]
    if not places:
        return None
    middle = rows[0].result.reward
    distances = [abs(value - middle) for row in shown for place in places for value in row.result.answers[place].values or []]
    span = float(np.quantile(distances, INSIDE)) or 1.0

    def tokens(answer: Answer) -> list[tuple[str, int, float]]:
        pairs = zip(answer.pieces or [], answer.values or [], strict=True)
        return [(text, round(max(-1.0, min(1.0, (value - middle) / span)) * SHADES), value) for text, value in pairs if text]

    responses = [(prompts[place], [(row.name, row.result.rewards[place], tokens(row.result.answers[place])) for row in shown]) for place in places]
    return {"responses": responses, "middle": middle, "span": span}


def _has_pieces(answer: Answer) -> bool:
    return bool(answer.pieces) and bool(answer.values) and len(answer.pieces or []) == len(answer.values or [])


def _level_cells(equal: EqualKL) -> dict[str, list[TableCell]]:
    """By row, its reward at each level, and at the end its largest with the divergence that it takes.

    The largest reward of a level is marked where no other interval reaches into its own, and no row has more at a smaller divergence.
    """
    column = QUALITY[0]
    digits = interval_digits([entry.interval for entries in equal.rewards.values() for entry in entries if entry.interval])
    made: dict[str, list[TableCell]] = {name: [] for name in equal.rewards}
    for place in range(len(equal.levels)):
        level = {name: entries[place] for name, entries in equal.rewards.items()}
        for name, entry in level.items():
            others = [other for other in level.values() if other is not entry and other.reward is not None]
            low = None if entry.interval is None else entry.interval[0]
            clear = low is not None and all(other.interval is not None and other.interval[1] < low for other in others)
            best = clear and bool(others) and not equal.better_before(place)
            made[name].append(TableCell(entry.reward, column.write(entry.reward, digits), column.write_interval(entry.interval, digits), best))
    for name, (kl, reward) in equal.largest.items():
        made[name].append(TableCell(reward, column.write(reward, digits), f"{kl:.3g} nats", False))
    return made


def _tried(findings: Findings) -> tuple[Table, list[bool]] | None:
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
