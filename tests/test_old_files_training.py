"""Training runs of the release before, finished and stopped, and what came of them then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from recontrol.training.loop import Learner
from recontrol.training.train import train
from recontrol.value import ValueFunction

OLD = Path(__file__).parent / "old_files"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RUNS = {"td": {}, "td-lambda": {"td_lambda": 0.9}, "reference": {"objective": "released"}, "preference": {"objective": "preference"}}
SETTINGS = {"hidden_dims": (8,), "learning_rate": 1e-2, "epochs": 3, "batch_size": 3, "progress": False, "device": "cpu", "validation_fraction": 0.25}
# Rounding of another CPU, 6e-8 a number, in 9 steps of Adam.
CLOSE = {"rel": 1e-4, "abs": 1e-5}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_as_then(name, value, history):
    hidden, then = torch.linspace(-1, 1, 18).reshape(3, 6), EXPECTED[f"run-{name}"]
    assert value(hidden).flatten().tolist() == pytest.approx([number for row in then["values"] for number in row], **CLOSE)
    assert len(history) == len(then["history"])
    for entry, old in zip(history, then["history"], strict=True):
        renamed = {"train_released_loss" if key == "train_reference_loss" else key: number for key, number in old.items()}
        assert entry == pytest.approx(renamed, **CLOSE)


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_returned_without_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "update", None)
    shutil.copytree(OLD / f"run-{name}", tmp_path / "v")
    assert_as_then(name, *train(OLD / "rollouts", out=tmp_path / "v", **SETTINGS, **RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on(name, tmp_path, monkeypatch):
    done = []
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *arguments: done.append(1) or update(*arguments))
    shutil.copytree(OLD / f"stopped-{name}", tmp_path / "v")
    assert_as_then(name, *train(OLD / "rollouts", out=tmp_path / "v", **SETTINGS, **RUNS[name]))
    batches = {"preference": 2}.get(name, 3)
    # It was stopped after four.
    assert len(done) == 3 * batches - 4
    ValueFunction.from_pretrained(tmp_path / "v")


def test_other_settings_are_still_told_apart(tmp_path):
    shutil.copytree(OLD / "stopped-reference", tmp_path / "v")
    with pytest.raises(ValueError, match="another objective: found 'released', wanted 'td'"):
        train(OLD / "rollouts", out=tmp_path / "v", **SETTINGS)
