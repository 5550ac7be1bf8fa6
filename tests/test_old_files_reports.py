"""What the release before wrote of evaluations: read, judged, and continued as a study."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import run

from recontrol.data.rewards.loading import load_reward
from recontrol.evaluation.response_files import read_responses
from recontrol.studies.run import StudyRun
from recontrol.studies.study import make_study

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests" / "old_files"
METHODS = ("uncontrolled", "RE-Control (alpha 0.5, n 3)")
REWARD = """
def letters(prompts, responses):
    return [float(response.count("e")) for response in responses]


letters.name = "letters"
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def expected():
    return json.loads((OLD / "expected.json").read_text(encoding="utf-8"))["evaluation"]


def test_responses_of_an_old_report_can_be_judged(expected, tmp_path, monkeypatch, capsys):
    for row in expected:
        assert [line.response for line in read_responses(OLD / "report" / "responses.jsonl", row["method"])] == row["responses"]
    (tmp_path / "old_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    responses = ["--responses", OLD / "report" / "responses.jsonl", "--method", METHODS[1], "--against", METHODS[0]]
    assert run("judge", *responses, "--reward-model", "python:old_rewards:letters") == 0
    assert "4 pairs: win rate" in capsys.readouterr().out


def test_an_old_evaluation_is_continued_by_a_study(expected, tmp_path, monkeypatch):
    """Cells of the same settings are read, and those that are missing are made."""
    (tmp_path / "old_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    # The name of the model is part of the settings.
    monkeypatch.chdir(ROOT)
    study = make_study(
        {
            "model": {"name": "examples/movie_reviews/lm", "dtype": "float32", "device": "cpu"},
            "prompts": {"test": {"source": "examples/movie_reviews/prompts-train.jsonl", "limit": 4}},
            "reward": {"names": ["python:old_rewards:letters"]},
            "value": str(OLD / "value-model"),
            "generation": {"max_new_tokens": 4, "batch_size": 2, "stop": ["\n"], "options": {"do_sample": True, "temperature": 1.0, "top_k": 0}},
            "methods": [{"method": "re-control", "alpha": 0.5, "n": 3}],
            "report": "all",
            "seed": 3,
            "seeds_apart": 0,
        }
    )
    assert load_reward(study.reward.names).name == "letters"
    shutil.copytree(OLD / "evaluation", tmp_path / "out" / "test")
    (missing,) = (tmp_path / "out" / "test").glob("re-control*/seed-3-batch-00001.json")
    old = json.loads(missing.read_text())
    missing.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "test").rglob("seed-*.json")}
    assert len(kept) == 3
    findings = StudyRun(study, tmp_path / "out", progress=False).findings()
    assert findings.names == [row["method"] for row in expected] == list(METHODS)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for result, row in zip(findings.results, expected, strict=True):
        assert result.responses == row["responses"] and result.reward == row["reward"]
        assert result.kl == pytest.approx(row["kl"]) and result.nll == pytest.approx(row["nll"])
    assert [answer["text"] for answer in json.loads(missing.read_text())["answers"]] == [answer["text"] for answer in old["answers"]]
