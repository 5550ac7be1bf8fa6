import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recontrol.data.rollouts import Rollouts
from recontrol.training.loop import Learner, Progress, RunFolder
from recontrol.training.objectives import TD
from recontrol.training.train import train
from recontrol.value import ValueFunction

ROOT = Path(__file__).parent.parent
# 36 responses to train on, hence 6 mini-batches an epoch.
SETTINGS = {"hidden_dims": (64,), "learning_rate": 1e-2, "epochs": 3, "batch_size": 6, "progress": False, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


def made(path, seed=0, **keywords):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (40,), generator=generator).tolist()
    states = [torch.randn(length, 6, generator=generator) for length in lengths]
    rewards = torch.stack([rows.mean(0).sum() for rows in states])
    return Rollouts.write(path, states, keywords.pop("rewards", rewards), groups=[index // 4 for index in range(40)], shard_size=16, **keywords)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return made(tmp_path_factory.mktemp("data") / "r")


@pytest.fixture(scope="module")
def uninterrupted(rollouts, tmp_path_factory):
    """The folder of a run without a break, and what it returned."""
    folder = tmp_path_factory.mktemp("whole") / "v"
    return folder, *train(rollouts, out=folder, **SETTINGS)


def names(folder):
    """What is in a folder, but for the lock that a run has held."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def count_updates(monkeypatch, at=None, then=None):
    """A list that grows with each mini-batch; after `at` of them, `then()` is called in the middle of the next."""
    done = []
    update = Learner.update

    def counting(*arguments):
        if at is not None and len(done) == at:
            then()
        done.append(1)
        return update(*arguments)

    monkeypatch.setattr(Learner, "update", counting)
    return done


def assert_goes_on(folder, rollouts, uninterrupted, monkeypatch, left):
    """The same call trains on the `left` mini-batches that remain, and the result is that of a run without a break, to the bit."""
    whole, value, history = uninterrupted
    with monkeypatch.context() as patch:
        done = count_updates(patch)
        again, history_again = train(rollouts, out=folder, **SETTINGS)
    assert len(done) == left
    assert history_again == history
    assert all(torch.equal(tensor, value.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert names(folder) == names(whole) == ["config.json", "history.json", "model.safetensors"]
    for name in names(whole):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


CHILD = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from recontrol.training.loop import Learner
from recontrol.training.train import train

rollouts, folder, how, at, settings = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5])
torch.set_num_threads(1)
updates, written = 0, 0
update, replace = Learner.update, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counting(*arguments):
    global updates
    if updates == at and how == "kill":
        die()
    if updates == at and how == "full disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    updates += 1
    return update(*arguments)

def replace_or_die(source, target):
    global written
    written += str(target).endswith("checkpoint.safetensors")
    if how == "kill while writing" and written == at:
        die()
    if how == "kill at the end" and str(target).endswith("model.safetensors"):
        die()
    replace(source, target)

Learner.update, os.replace = counting, replace_or_die
train(rollouts, out=folder, **settings)
"""


def run_child(rollouts, folder, how, at):
    arguments = [str(rollouts.path), str(folder), how, str(at), json.dumps(SETTINGS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_and_ends_as_if_it_had_not_been(rollouts, uninterrupted, tmp_path, monkeypatch):
    child = run_child(rollouts, tmp_path / "v", "kill", 9)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert names(tmp_path / "v") == ["checkpoint.safetensors", "history.json"]
    written = json.loads((tmp_path / "v" / "history.json").read_text())
    assert written["finished"] is False and written["epochs"] == uninterrupted[2][:1]
    with pytest.raises(ValueError, match=r"no value function: config\.json is missing"):
        ValueFunction.from_pretrained(tmp_path / "v")
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=9)


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(rollouts, uninterrupted, tmp_path, monkeypatch):
    # At the fifth checkpoint, which is written beside the fourth but not in its place.
    child = run_child(rollouts, tmp_path / "v", "kill while writing", 5)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [name for name in names(tmp_path / "v") if name.endswith(".part")]
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=14)


def test_a_run_killed_while_it_writes_the_value_function_only_writes_it_again(rollouts, uninterrupted, tmp_path, monkeypatch):
    child = run_child(rollouts, tmp_path / "v", "kill at the end", 0)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert "model.safetensors" not in names(tmp_path / "v")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        ValueFunction.from_pretrained(tmp_path / "v")
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=0)


def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(rollouts, uninterrupted, tmp_path, monkeypatch):
    # From the eighth mini-batch on, no file may be larger than 4096 bytes; a checkpoint is.
    child = run_child(rollouts, tmp_path / "v", "full disk", 7)
    assert child.returncode == 1
    assert "OSError" in child.stderr and f"could not write {tmp_path / 'v' / 'checkpoint.safetensors'}: File too large" in child.stderr
    assert names(tmp_path / "v") == ["checkpoint.safetensors", "history.json"]
    assert (tmp_path / "v" / "checkpoint.safetensors").stat().st_size > 4096
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=11)


def interrupt():
    # The signal of Ctrl-C, with the handler that Python has by default; who runs the tests may have switched it off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("every", "at", "left"), [(1, 8, 10), (4, 11, 8), (100, 8, 12), (100, 3, 18)])
def test_ctrl_c_says_how_to_go_on_and_loses_what_came_after_the_checkpoint(rollouts, uninterrupted, tmp_path, monkeypatch, caplog, every, at, left):
    """Checkpoints come every so many mini-batches and after each epoch; how many is free to change."""
    with monkeypatch.context() as patch:
        count_updates(patch, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(rollouts, out=tmp_path / "v", checkpoint_every=every, **SETTINGS)
    wanted = f"interrupted in epoch {at // 6} after {at % 6} of 6 mini-batches; the same call goes on from the last checkpoint in {tmp_path / 'v'}"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [wanted]
    assert not list((tmp_path / "v").glob(".*.part"))
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left)


def test_ctrl_c_in_the_middle_of_validation_loses_no_mini_batch(rollouts, uninterrupted, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TD, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(rollouts, out=tmp_path / "v", **SETTINGS)
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=12)


def test_ctrl_c_without_a_folder_says_that_nothing_is_kept(rollouts, monkeypatch, caplog):
    count_updates(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(rollouts, **SETTINGS)
    assert "interrupted in epoch 0 after 2 of 6 mini-batches; nothing was kept: there is no out folder" in caplog.text


def test_two_runs_do_not_write_one_folder(rollouts, uninterrupted, tmp_path, monkeypatch):
    refused = []

    def second():
        with pytest.raises(RuntimeError, match=f"another run is writing into {tmp_path / 'v'}") as raised:
            train(rollouts, out=tmp_path / "v", **SETTINGS)
        refused.append(raised.value)

    with monkeypatch.context() as patch:
        count_updates(patch, 8, second)
        value, history = train(rollouts, out=tmp_path / "v", **SETTINGS)
    # The first is not disturbed.
    assert len(refused) == 1 and history == uninterrupted[2]
    assert all(torch.equal(tensor, uninterrupted[1].state_dict()[name]) for name, tensor in value.state_dict().items())


def test_a_run_may_be_stopped_many_times(rollouts, uninterrupted, tmp_path, monkeypatch):
    for _ in range(8):
        with monkeypatch.context() as patch:
            count_updates(patch, 2, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(rollouts, out=tmp_path / "v", **SETTINGS)
    assert_goes_on(tmp_path / "v", rollouts, uninterrupted, monkeypatch, left=2)


def test_early_stopping_goes_on_counting_and_keeps_the_best_weights_across_a_break(tmp_path, monkeypatch):
    noise = made(tmp_path / "r", rewards=torch.randn(40, generator=torch.Generator().manual_seed(3)))
    settings = {**SETTINGS, "epochs": 50, "patience": 3, "validation_fraction": 0.3}
    value, history = train(noise, **settings)
    best = value.provenance["best_epoch"]["epoch"]
    assert len(history) == best + 4 < 50
    # 28 responses to train on, hence 5 mini-batches: in the second epoch after the best.
    with monkeypatch.context() as patch:
        count_updates(patch, 5 * (best + 2) + 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(noise, out=tmp_path / "v", **settings)
    again, history_again = train(noise, out=tmp_path / "v", **settings)
    assert history_again == history
    assert all(torch.equal(tensor, value.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_finished_run_is_returned_without_work(rollouts, uninterrupted, monkeypatch):
    folder, value, history = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = count_updates(monkeypatch)
    # How often checkpoints are written does not decide the result.
    again, history_again = train(rollouts, out=folder, checkpoint_every=7, **SETTINGS)
    assert not done and history_again == history and again.provenance == value.provenance
    assert all(torch.equal(tensor, value.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # Killed between saying so and removing the checkpoint.
    (folder / "checkpoint.safetensors").touch()
    train(rollouts, out=folder, **SETTINGS)
    assert names(folder) == ["config.json", "history.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed: found 0, wanted 1"),
        ({"hidden_dims": (64, 8)}, r"another hidden_dims: found \[64\], wanted \[64, 8\]"),
        ({"learning_rate": 0.5}, "another learning_rate: found 0.01, wanted 0.5"),
        ({"batch_size": 7}, "another batch_size: found 6, wanted 7"),
        ({"epochs": 4}, "another epochs: found 3, wanted 4"),
        ({"patience": None}, "another patience: found 10, wanted None"),
        ({"validation_fraction": 0.2}, "another validation_fraction: found 0.1, wanted 0.2"),
        ({"td_lambda": 0.5}, "another objective: found 'td', wanted 'td-lambda'"),
        ({"dtype": torch.float64}, "another dtype: found 'float32', wanted 'float64'"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_going_on_with_other_settings_is_refused(rollouts, uninterrupted, change, message):
    folder, *_ = uninterrupted
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message) as raised:
        train(rollouts, out=folder, **{**SETTINGS, **change})
    assert "use the same settings to go on with it, or another folder" in str(raised.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_going_on_with_other_rollouts_is_refused(rollouts, uninterrupted, tmp_path):
    states, lengths, rewards = rollouts.batch(range(40))
    changed = states.clone()
    changed[-1, 0] += 1
    same = {"rows": states, "scores": rewards, "groups": rollouts.groups}
    for name, other in {"rows": changed, "scores": rewards + 1, "groups": rollouts.groups + 1}.items():
        rows, scores, groups = {**same, name: other}.values()
        other = Rollouts.write(tmp_path / name, list(rows.split(lengths.tolist())), scores, groups=groups)
        with pytest.raises(ValueError, match=r"another rollouts: found '[0-9a-f]{64}', wanted '[0-9a-f]{64}'"):
            train(other, out=uninterrupted[0], **SETTINGS)
    # The same ones elsewhere, in shards of another size, are the same.
    moved = Rollouts.write(tmp_path / "moved", list(states.split(lengths.tolist())), rewards, groups=rollouts.groups)
    assert train(moved, out=uninterrupted[0], **SETTINGS)[1] == uninterrupted[2]


@pytest.fixture
def stopped(rollouts, tmp_path, monkeypatch):
    """The folder of a run that was stopped after eight mini-batches."""
    with monkeypatch.context() as patch:
        count_updates(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(rollouts, out=tmp_path / "v", **SETTINGS)
    return tmp_path / "v"


@pytest.mark.parametrize("size", [0, 4, 8, 100, 3000, -1])
def test_a_checkpoint_cut_in_the_middle_is_refused_until_it_is_deleted(rollouts, uninterrupted, stopped, monkeypatch, size):
    path = stopped / "checkpoint.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is no whole checkpoint \(.*\); delete it to train from the beginning"):
        train(rollouts, out=stopped, **SETTINGS)
    path.unlink()
    assert_goes_on(stopped, rollouts, uninterrupted, monkeypatch, left=18)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"weight": torch.zeros(2)}, None),
        ({"weights.layers.0.weight": torch.zeros(2)}, None),
        ({"weights.layers.0.weight": torch.zeros(2)}, {"format": "pt"}),
        ({}, {"progress": "{", "settings": "{}"}),
        ({}, {"progress": '{"page": 1}', "settings": "{}"}),
    ],
)
def test_a_foreign_file_in_the_place_of_the_checkpoint_is_refused(rollouts, stopped, tensors, metadata):
    save_file(tensors, stopped / "checkpoint.safetensors", metadata)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is no whole checkpoint"):
        train(rollouts, out=stopped, **SETTINGS)


def test_the_checkpoint_of_another_run_is_refused(rollouts, stopped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_updates(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(rollouts, seed=5, out=tmp_path / "other", **SETTINGS)
    (tmp_path / "other" / "checkpoint.safetensors").replace(stopped / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of a run with another seed: found 5, wanted 0"):
        train(rollouts, out=stopped, **SETTINGS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, r"holds config\.json but no history\.json: it is not the folder of a training run"),
        ({"checkpoint.safetensors": "x", "model.safetensors": "x"}, r"holds model\.safetensors, checkpoint\.safetensors but no history\.json"),
        ({"history.json": '{"epochs": []}'}, r"history\.json is not the history of a training run: found format None, wanted 'recontrol\.training'"),
        ({"history.json": "[1, 2]"}, r"history\.json is not the history of a training run: found format 'list'"),
        ({"history.json": '{"format": "recontrol.training", "settings": {}}'}, r"history\.json is not the history of a training run"),
        ({"history.json": '{"format": "recontr'}, r"history\.json is not valid JSON"),
    ],
)
def test_a_foreign_folder_is_refused_and_left_as_it_is(rollouts, tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        train(rollouts, out=tmp_path, **SETTINGS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_file_in_the_place_of_the_folder_is_refused(rollouts, tmp_path):
    (tmp_path / "v").touch()
    with pytest.raises(ValueError, match="is a file; training writes into a folder"):
        train(rollouts, out=tmp_path / "v", **SETTINGS)


def test_a_folder_with_other_things_is_used_and_leftovers_of_dead_processes_are_removed(rollouts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f".checkpoint.safetensors.{dead}.part").touch()
    live = tmp_path / f".checkpoint.safetensors.{os.getppid()}.part"
    live.touch()
    train(rollouts, out=tmp_path, **{**SETTINGS, "epochs": 1})
    assert names(tmp_path) == [live.name, "config.json", "history.json", "model.safetensors", "notes.txt"]


def trained_a_little(sizes=(3, 2)):
    layer = torch.nn.Linear(*sizes)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, sizes[0])).square().sum().backward()
    optimizer.step()
    return layer, optimizer


def test_a_checkpoint_reads_back_to_the_bit(tmp_path):
    layer, optimizer = trained_a_little()
    best = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    # Numbers that a decimal of few digits would not keep.
    progress = Progress(
        epoch=1, position=2, loss=0.1 + 0.2, count=7, best_epoch=0, history=[{"epoch": 0, "train_td_loss": 1 / 3, "validation_correlation": None}]
    )
    RunFolder(tmp_path / "v", {"a": (1, 2)}).save(progress, best, layer.state_dict(), optimizer, {})
    other, other_optimizer = trained_a_little()
    found, found_best = RunFolder(tmp_path / "v", {"a": [1, 2]}).load(other.state_dict(), other_optimizer, {})
    assert found == progress
    assert found_best.keys() == best.keys() and all(torch.equal(found_best[name], best[name]) for name in best)
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)
    state, other_state = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert state.keys() == other_state.keys() == {0, 1}
    assert all(torch.equal(state[index][name], other_state[index][name]) for index in state for name in ("step", "exp_avg", "exp_avg_sq"))


def test_the_checkpoint_of_another_value_function_is_refused(tmp_path):
    layer, optimizer = trained_a_little()
    RunFolder(tmp_path / "v", {}).save(Progress(position=1), {}, layer.state_dict(), optimizer, {})
    other, other_optimizer = trained_a_little((3, 5))
    before = other.weight.clone()
    with pytest.raises(ValueError, match=r"of another value function: found .*\[2, 3\].*wanted .*\[5, 3\]"):
        RunFolder(tmp_path / "v", {}).load(other.state_dict(), other_optimizer, {})
    assert torch.equal(other.weight, before)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer, optimizer = trained_a_little()
    folder = RunFolder(None, {})
    folder.save(Progress(position=1), {}, layer.state_dict(), optimizer, {})
    assert folder.load(layer.state_dict(), optimizer, {}) == (Progress(), {})
    folder.finish(Progress())
    assert not list(tmp_path.iterdir())
