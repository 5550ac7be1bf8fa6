"""The settings of training: how they are given, and what a new objective needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import SETTINGS, made, same

import recontrol as rc
from recontrol.training.config import TrainConfig, config_of
from recontrol.training.objectives import OBJECTIVES
from recontrol.training.objectives.tokens import TokenObjective
from recontrol.training.train import train

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


def test_settings_are_a_config_keywords_or_widths_and_a_seed():
    wanted = TrainConfig(hidden_dims=(8,), seed=3, td_lambda=0.9)
    assert config_of((8,), 3, {"td_lambda": 0.9}) == config_of(None, None, {"hidden_dims": [8], "seed": 3, "td_lambda": 0.9}) == wanted
    assert config_of(TrainConfig(hidden_dims=(8,), td_lambda=0.1), 3, {"td_lambda": 0.9}) == wanted
    assert config_of(wanted, None, {}) == wanted and config_of(None, None, {}) == TrainConfig()
    assert rc.TrainConfig is TrainConfig


def test_they_give_the_same_value_function(tmp_path):
    rollouts = made(tmp_path / "r")
    others = {name: SETTINGS[name] for name in ("progress", "device")}
    settings = {name: setting for name, setting in SETTINGS.items() if name not in (*others, "hidden_dims")}
    value, history = train(rollouts, (8,), 2, **others, **settings)
    for again, history_again in (train(rollouts, TrainConfig(hidden_dims=(8,), seed=2, **settings), **others), train(rollouts, seed=2, **SETTINGS)):
        assert same(again, value) and history_again == history


def test_a_setting_that_there_is_not_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"train has no setting td_lamda, learn_rate; it has objective, td_lambda, .*, kernel$"):
        train(made(tmp_path / "r"), td_lamda=0.9, learn_rate=1.0)


def test_the_old_name_of_the_released_loss_warns():
    with pytest.warns(DeprecationWarning, match="objective='reference' is now 'released'"):
        assert TrainConfig("reference") == TrainConfig("released")


def test_dtypes_are_those_of_torch_or_their_names():
    assert TrainConfig(dtype=torch.float64, compute_dtype=torch.bfloat16) == TrainConfig(dtype="float64", compute_dtype="bfloat16")
    assert TrainConfig(dtype="float64", compute_dtype=torch.float64).compute_dtype is None


def test_what_follows_from_other_settings_is_recorded():
    assert TrainConfig(td_lambda=0.5).record()["objective"] == "td-lambda" and TrainConfig().record()["objective"] == "td"
    assert TrainConfig("mc").record()["td_lambda"] == 1.0


def test_a_new_objective_is_one_class(tmp_path):
    class Halfway(TokenObjective):
        """Regression of half of the reward."""

        name, loss_name = "halfway", "train_halfway_loss"

        def loss(self, values, rewards, lengths):
            return (values - 0.5 * rewards.repeat_interleave(lengths, dim=0)).square().mean()

    try:
        settings = {**SETTINGS, "objective": "halfway"}
        value, history = train(made(tmp_path / "r"), out=tmp_path / "v", **settings)
        assert {"train_halfway_loss", "validation_mc_error"} < history[0].keys() and value.provenance["training"]["objective"] == "halfway"
        assert same(train(tmp_path / "r", out=tmp_path / "v", **settings)[0], value)
    finally:
        del OBJECTIVES["halfway"]


def test_one_process_needs_no_accelerate(tmp_path):
    made(tmp_path / "r")
    code = (
        "import sys, recontrol.data.online\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'accelerate']: del sys.modules[name]\n"
        "sys.modules['accelerate'] = None\n"
        "from recontrol.training.train import train\n"
        "value, history = train(sys.argv[1], (8,), epochs=1, device='cpu', progress=False)\n"
        "print(len(history))\n"
        "try:\n"
        "    train(sys.argv[1], log_with='tensorboard')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "r"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1\n") and "pip install 'recontrol[train]'" in done.stdout
