"""Two processes train as one does, and what is tracked."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from test_train import made

from recontrol.training.train import train
from recontrol.value import ValueFunction

ROOT = Path(__file__).parent.parent
SETTINGS = {"hidden_dims": (8,), "learning_rate": 1e-2, "epochs": 2, "batch_size": 9, "progress": False}
RUNS = {
    "td": {"ema_decay": 0.7, "max_gradient_norm": 0.3, "td_lambda": 0.5},
    "preference": {"objective": "preference", "preference_regression": 1.0, "preference_regulariser": 0.5, "batch_size": 3},
    # One response, or one prompt, for two processes.
    "small": {"batch_size": 1, "validation_fraction": 0, "epochs": 1},
    "small preference": {"objective": "preference", "batch_size": 1, "validation_fraction": 0, "epochs": 1},
}

pytestmark = pytest.mark.usefixtures("one_thread")

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from recontrol.training.train import train

rollouts, folder, settings, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
for name, options in runs.items():
    value, history = train(rollouts, out=f"{folder}/{name}", **{**settings, **options})
    print(name, float(sum(parameter.double().sum() for parameter in value.parameters())))
try:
    train(rollouts, out=f"{folder}/td", **settings)
except ValueError as error:
    print(str(error).split(": ", 1)[1].split(";")[0])
"""


def launch(*arguments):
    """Two processes as `accelerate launch` or `torchrun` start them, on the CPU; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    common |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *arguments]
    children = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        results = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, err) in zip(children, results, strict=True):
        assert child.returncode == 0, err
    return [out for out, _ in results]


def test_two_processes_give_the_result_of_one_within_rounding(tmp_path):
    rollouts = made(tmp_path / "r", heads=2)
    first, second = launch(str(rollouts.path), str(tmp_path / "two"), json.dumps(SETTINGS), json.dumps(RUNS))
    # Both hold the same weights to the bit, and refuse the same.
    assert first == second and "found" in first.splitlines()[-1]
    for name, options in RUNS.items():
        value, history = train(rollouts, out=tmp_path / "one" / name, device="cpu", **{**SETTINGS, **options})
        two = ValueFunction.from_pretrained(tmp_path / "two" / name)
        assert sorted(path.name for path in (tmp_path / "two" / name).iterdir()) == [".lock", "config.json", "history.json", "model.safetensors"]
        for parameter, other in zip(value.parameters(), two.parameters(), strict=True):
            # Gradients are added up in another order: float32 rounding, 6e-8, in some tens of steps of Adam, which enlarges that of small gradients.
            torch.testing.assert_close(other, parameter, rtol=1e-4, atol=1e-5)
        written = json.loads((tmp_path / "two" / name / "history.json").read_text())
        assert written["finished"] and len(written["epochs"]) == len(history)
        for entry, other in zip(history, written["epochs"], strict=True):
            assert other == pytest.approx(entry, rel=1e-3, abs=1e-4)


class Tracker(GeneralTracker):
    name = "test"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.entries, self.finished = None, [], False

    @property
    def tracker(self):
        return self

    @on_main_process
    def store_init_configuration(self, values):
        self.config = values

    @on_main_process
    def log(self, values, step=None, **options):
        self.entries.append((step, values))

    @on_main_process
    def finish(self):
        self.finished = True


def test_trackers_get_the_settings_and_the_history(tmp_path):
    tracker = Tracker()
    _, history = train(made(tmp_path / "r"), log_with=tracker, device="cpu", **SETTINGS)
    assert tracker.config["learning_rate"] == 1e-2 and tracker.config["hidden_dims"] == "[8]"
    assert [step for step, _ in tracker.entries] == [0, 1] and [entry for _, entry in tracker.entries] == history
    assert tracker.finished


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="found 0 of the trackers"):
        train(made(tmp_path / "r"), out=tmp_path / "v", log_with="tensorboard", device="cpu", **SETTINGS)
    assert not (tmp_path / "v").exists()
    with pytest.raises(ValueError, match="Unsupported logging capability: nothing"):
        train(made(tmp_path / "s"), log_with="nothing", device="cpu", **SETTINGS)
