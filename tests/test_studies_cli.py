"""`recontrol evaluate --config`: the studies of the package from end to end, on models that are small and random."""

import csv
import json
import sys

import pytest
from test_cli import one_line, run

from recontrol.studies.study import load_study, study_names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", study_names())
def test_a_study_of_the_package_runs_dry(name, tmp_path, capsys):
    assert run("evaluate", "--config", name, "--dry-run", "--out", tmp_path) == 0
    assert f"report.html, report.json, report.csv and responses.jsonl are in {tmp_path}" in capsys.readouterr().out
    entries = load_study(name).methods
    names = ["uncontrolled", *(entry.get("name", entry["method"]) for entry in entries)]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["results"]] == names
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(names)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    controlled = next(row for row in report["results"] if row["name"] == "RE-Control")
    assert (controlled["step_size"], controlled["steps"]) == (entries[0]["alpha"], entries[0]["n"])


def test_what_goes_with_a_study_and_what_does_not(tmp_path, capsys):
    cases = {
        ("--config", "hh-rlhf-vicuna-7b", "--model", "some/model"): "--config says what to do; found --model beside it",
        ("--model", "some/model", "--dry-run"): "--dry-run goes with --config",
        ("--model", "some/model"): "--value, --dataset, --reward-model must be given, or --config",
        ("--config", "nothing"): "no study at 'nothing'",
    }
    for arguments, message in cases.items():
        assert run("evaluate", *arguments, "--out", tmp_path) == 2
        assert message in one_line(capsys)


def test_a_missing_package_of_the_report_is_found_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("evaluate", "--config", "hh-rlhf-vicuna-7b", "--dry-run", "--out", tmp_path / "out") == 2
    assert "pip install 'recontrol[report]'" in one_line(capsys)
    assert not (tmp_path / "out").exists()
