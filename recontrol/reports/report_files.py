"""The files of a report: a page to read, a table for spreadsheets, JSON for programs, and all responses as lines."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recontrol.evaluation.results import UNCONTROLLED, Result
from recontrol.files import write_aside, write_json
from recontrol.reports.columns import COST, QUALITY
from recontrol.reports.comparison import Findings, Row, equal_kl, gain_interval, make_rows
from recontrol.reports.page import render, versions
from recontrol.training.diagnosis import Diagnosis, diagnose_values
from recontrol.version import __version__

FORMAT = "recontrol.report"
FORMAT_VERSION = 2
FILES = ("responses.jsonl", "report.csv", "report.html", "report.json")
# Responses whose V is written; a reader can draw no more.
TRACES = 3
# Fewer say nothing about a value function.
FEWEST = 3


def save_findings(out: str | os.PathLike, findings: Findings, study: Any = None, *, command: str | None = None) -> None:
    """Write `report.html`, `report.json`, `report.csv` and `responses.jsonl` into a folder, each whole or not at all.

    The study is a dataclass or a mapping ready for JSON; without a `command` the page has that which runs the study as it stands there.
    """
    rows = make_rows(findings)
    sections: dict[str, Any] = dataclasses.asdict(study) if dataclasses.is_dataclass(study) and not isinstance(study, type) else dict(study or {})
    equal, diagnosis = equal_kl(findings), _diagnosis(findings.results[0])
    if command is None:
        command = "recontrol evaluate --config study.yaml --out FOLDER" if sections else ""
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
        asked = ((seed, index, prompt) for seed in range(row.result.seeds) for index, prompt in enumerate(prompts))
        for (seed, index, prompt), response, reward in zip(asked, row.result.responses, row.result.rewards, strict=True):
            yield {"method": row.name, "seed": seed, "index": index, "prompt": prompt, "response": response, "reward": reward}


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
        line = {"method": row.name, "setting": row.setting, "kind": result.kind, "prompts": prompts, "seeds": result.seeds}
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


def _diagnosis(base: Result) -> Diagnosis | None:
    known = [(answer.values, reward) for answer, reward in zip(base.answers, base.rewards, strict=False) if answer.values]
    return diagnose_values([values for values, _ in known], [reward for _, reward in known]) if len(known) >= FEWEST else None
