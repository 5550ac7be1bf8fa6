"""The files of a report: a page to read, a table for spreadsheets, JSON for programs, and all responses as lines."""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recontrol.data.dialogue import turns_entry
from recontrol.evaluation.results import UNCONTROLLED, Result
from recontrol.files import write_aside, write_json
from recontrol.reports.columns import COST, QUALITY
from recontrol.reports.comparison import Findings, Row, equal_kl, gain_interval, make_rows
from recontrol.reports.page import render, versions
from recontrol.training.diagnosis import Diagnosis, diagnose_values
from recontrol.version import __version__

FORMAT = "recontrol.report"
FORMAT_VERSION = 2
# Responses whose V is written; a reader can draw no more.
TRACES = 3
# Fewer say nothing about a value function.
FEWEST = 3


def save_findings(out: str | os.PathLike, findings: Findings, study: Any = None, *, command: str | None = None) -> None:
    """Write `report.html`, `report.json`, `report.csv` and `responses.jsonl` into a folder, each whole or not at all.

    Args:
        out: the folder, made if absent.
        findings: what a study found.
        study: the study, a dataclass or a mapping ready for JSON; None leaves out what only it knows.
        command: that made it; None is the command that runs the study as it stands in the page.

    Raises:
        ValueError: results that do not fit the names, the prompts or the win rates.
        OSError: the folder cannot be written.
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
        "results": [{"name": row.name, **_summary(row.result, rows[0].result), "win_rate": None if row.win is None else row.win.to_dict()} for row in rows],
        "against": findings.against,
        "validation": [_summary(result, findings.validation[0]) for result in findings.validation] or None,
        "groups": findings.groups,
        "chosen": findings.chosen,
        "equal_kl": None if equal is None else dataclasses.asdict(equal),
        "calibration": None if diagnosis is None else dataclasses.asdict(diagnosis),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "responses.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _responses(rows, findings.prompts)))
    _write(folder / "report.csv", _csv(rows, len(findings.prompts)))
    write_json(folder / "report.json", _finite(content))
    _write(folder / "report.html", page)


def _responses(rows: Sequence[Row], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Each response with its method, seed (0 for the first) and prompt."""
    lines = []
    for row in rows:
        asked = [(seed, index, prompt) for seed in range(row.result.seeds) for index, prompt in enumerate(prompts)]
        for (seed, index, prompt), response, reward in zip(asked, row.result.responses, row.result.rewards, strict=True):
            lines.append({"method": row.name, "seed": seed, "index": index, "prompt": prompt, **turns_entry(prompt), "response": response, "reward": reward})
    return lines


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


def _finite(content: Any) -> Any:
    """What JSON can hold: numbers that it does not have are null."""
    if isinstance(content, Mapping):
        return {str(name): _finite(entry) for name, entry in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(entry) for entry in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(path: Path, text: str) -> None:
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
