"""The files of a report: one HTML page to read, with figures and styles inside, a table for spreadsheets, JSON for programs, and all responses as lines."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from recontrol.checks import required
from recontrol.data.dialogue import turns_entry
from recontrol.evaluation.measure import Answer
from recontrol.evaluation.results import UNCONTROLLED, Result
from recontrol.files import write_aside, write_json
from recontrol.methods.control import ReControl
from recontrol.reports.comparison import EqualKL, Findings, Row, equal_kl, gain_interval, make_rows, sweep
from recontrol.reports.figures import calibration, frontier, resources, sweeps
from recontrol.reports.table import COST, QUALITY, Cell, Column, interval_digits, measured, rule_in_words
from recontrol.training.diagnosis import Diagnosis, diagnose_values
from recontrol.version import __version__

FILES = ("responses.jsonl", "report.csv", "report.html", "report.json")
FORMAT, FORMAT_VERSION = "recontrol.report", 2
# Responses whose V is written, prompts whose tokens have the colour of V, and how many responses say something about a value function.
TRACES, COLOURED, FEWEST = 3, 3, 3
# Shades of colour on each side of the middle, and the share of the tokens whose V is inside the scale.
SHADES, INSIDE = 8, 0.98
# What settings are chosen by, the paper's sum at the end; the best of many tries is not marked, since it may be the luckiest.
TRIED = (
    *(dataclasses.replace(column, responses_path="") for column in QUALITY if column.key in ("reward", "kl", "nll", "diversity", "coherence", "value_end")),
    Column("score", "Sum", path="score"),
)


def save_findings(out: str | os.PathLike, findings: Findings, study: Any = None, *, command: str | None = None) -> None:
    """Write report.html, report.json, report.csv and responses.jsonl into a folder; the study is a dataclass or a mapping ready for JSON."""
    rows = make_rows(findings)
    sections: dict[str, Any] = dataclasses.asdict(study) if dataclasses.is_dataclass(study) and not isinstance(study, type) else dict(study or {})
    values, rewards = [answer.values or [] for answer in rows[0].result.answers], rows[0].result.rewards
    diagnosis = diagnose_values(values, rewards[: len(values)]) if sum(map(bool, values)) >= FEWEST else None
    equal = equal_kl(findings)
    command = "recontrol evaluate --config study.yaml --out FOLDER" if command is None and sections else command or ""
    page = render(findings, rows, equal, diagnosis, sections, command)
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "made_with": {"recontrol": __version__},
        "study": sections or None,
        "command": command or None,
        "versions": versions(),
        "results": [{"name": row.name, **_summary(row.result, rows[0].result), "win_rate": row.win and row.win.to_dict()} for row in rows],
        "against": findings.against,
        "validation": [_summary(result, findings.validation[0]) for result in findings.validation] or None,
        "groups": findings.groups,
        "chosen": findings.chosen,
        "equal_kl": equal and dataclasses.asdict(equal),
        "calibration": diagnosis and dataclasses.asdict(diagnosis),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _responses(rows, findings.prompts))
    for name, text in zip(FILES, (lines, _csv(rows, len(findings.prompts)), page), strict=False):
        with write_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    # Numbers that JSON does not have are null.
    write_json(folder / FILES[-1], json.loads(json.dumps(content), parse_constant=lambda name: None))


def _responses(rows: Sequence[Row], prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each response with its method, seed (0 for the first) and prompt."""
    for row in rows:
        for number, (response, reward) in enumerate(zip(row.result.responses, row.result.rewards, strict=True)):
            seed, index = divmod(number, len(prompts))
            yield {
                "method": row.name,
                "seed": seed,
                "index": index,
                "prompt": prompts[index],
                **turns_entry(prompts[index]),
                "response": response,
                "reward": reward,
            }


def _summary(result: Result, base: Result) -> dict[str, Any]:
    """A result without its texts, which `responses.jsonl` has, with V along a few responses and its gain over the uncontrolled model."""
    content = {**result.summary(), "values": result.values[:TRACES]}
    if result is not base and base.kind == UNCONTROLLED:
        content["reward_gain"] = result.reward - base.reward
        content["reward_gain_interval"] = gain_interval(result, base)
    return content


def _csv(rows: Sequence[Row], prompts: int) -> str:
    """One line a row of the report, with every digit."""
    lines = []
    for row in rows:
        result = row.result
        line: dict[str, Any] = {"method": row.name, "setting": row.setting, "kind": result.kind, "prompts": prompts, "seeds": result.seeds}
        for column in (*QUALITY, *COST):
            line[column.key] = column.number(row)
            if any(column.interval(other) is not None for other in rows):
                line[f"{column.key}_low"], line[f"{column.key}_high"] = column.interval(row) or (None, None)
        if row.win is not None:
            line |= {"wins": row.win.wins, "ties": row.win.ties, "losses": row.win.losses}
        line |= {f"head_reward_{number}": reward for number, reward in enumerate(result.head_rewards)}
        lines.append(line)
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


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
    # Prompts and responses may have any text in them; a name that is not known is an error.
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("recontrol.reports", "templates"), **options)
    given = {"study": study, "findings": findings, "rows": rows, "equal": equal, "diagnosis": diagnosis, "command": command, "shades": SHADES}
    figures = {"frontier": frontier(rows, base, groups), "sweeps": sweeps(base, groups), "resources": resources(rows)}
    figures["calibration"] = {} if diagnosis is None else calibration(diagnosis, rows)
    tables = {"quality": make_table(QUALITY, rows), "cost": make_table(COST, rows), "tried": _tried(findings), "level_cells": equal and _level_cells(equal)}
    return environment.get_template("page.html").render(
        rule=rule_in_words(study["choose"]) if study.get("choose") else "",
        made={"Made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **versions()},
        machine=f"{platform.system()} {platform.machine()}, {hardware}",
        coloured=_coloured(rows, findings.prompts),
        glossary=measured((*QUALITY, *COST), rows),
        settings=as_yaml(study),
        **{**given, **figures, **tables},
    )


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    return {"recontrol": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "Python": platform.python_version()}


def _coloured(rows: Sequence[Row], prompts: Sequence[str]) -> dict[str, Any] | None:
    """The first responses of the uncontrolled model and of RE-Control token by token, with V and its shade; None where V was not recorded."""
    # RE-Control alone, else the first row that it is a part of.
    controlled = sorted((row for row in rows[1:] if ReControl.kind in row.result.kind.split(" + ")), key=lambda row: row.result.kind != ReControl.kind)
    shown = [row for row in (rows[0], *controlled[:1]) if row.result.answers]
    answers = [[row.result.answers[place] for row in shown] for place in range(len(prompts))]
    places = [place for place, each in enumerate(answers) if each and all(one.values and len(one.values) == len(one.pieces or []) for one in each)][:COLOURED]
    if not places:
        return None
    middle = rows[0].result.reward
    span = float(np.quantile([abs(value - middle) for place in places for answer in answers[place] for value in answer.values or []], INSIDE)) or 1.0

    def shaded(answer: Answer) -> list[tuple[str, int, float]]:
        tokens = zip(answer.pieces or [], answer.values or [], strict=True)
        return [(text, round(max(-1.0, min(1.0, (value - middle) / span)) * SHADES), value) for text, value in tokens if text]

    responses = [(prompts[at], [(row.name, row.result.rewards[at], shaded(row.result.answers[at])) for row in shown]) for at in places]
    return {"responses": responses, "middle": middle, "span": span}


def _level_cells(equal: EqualKL) -> dict[str, list[Cell]]:
    """By row, its reward at each level, marked where no other interval reaches into its own and no row has more before, and its largest with its divergence."""
    column = QUALITY[0]
    digits = interval_digits([entry.interval for entries in equal.rewards.values() for entry in entries if entry.interval])
    made: dict[str, list[Cell]] = {}
    for name, entries in equal.rewards.items():
        made[name] = []
        for place, entry in enumerate(entries):
            levels = (others[place] for other, others in equal.rewards.items() if other != name)
            others = [other.interval for other in levels if other.reward is not None]
            clear = entry.interval is not None and all(other is not None and other[1] < entry.interval[0] for other in others)
            made[name].append(column.cell(entry.reward, entry.interval, digits, clear and bool(others) and not equal.better_before(place)))
        kl, reward = equal.largest[name]
        made[name].append({**column.cell(reward, None, digits), "interval": f"{kl:.3g} nats"})
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
    # Tuples become lists, which YAML has.
    given = json.loads(json.dumps(study), object_hook=lambda section: {name: entry for name, entry in section.items() if entry is not None})
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None) if study else ""
