import json
import shutil
import subprocess

import pytest
import torch

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter, read_manifest
from recontrol.files import writing_lock

RECORD = {"index": 0, "prompt": "line\u2028break", "response": "", "reward": [1.0], "finish": "eos"}


@pytest.fixture
def folder(tmp_path):
    states = [torch.randn(length, 8) for length in (3, 1, 5)]
    return Rollouts.write(tmp_path / "r", states, [1.0, 2.0, 3.0], ["a", "b", "c"], shard_size=1).path


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_what_was_written_verifies(folder):
    Rollouts(folder).verify()
    assert len(read_manifest(folder)["checksums_sha256"]) == 64
    assert not list(folder.glob("shard-*.sha256"))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_list_is_one_that_sha256sum_reads(folder):
    assert subprocess.run(["sha256sum", "--quiet", "--check", "checksums.sha256"], cwd=folder, check=False).returncode == 0
    flip(folder / "shard-00001.safetensors")
    assert subprocess.run(["sha256sum", "--status", "--check", "checksums.sha256"], cwd=folder, check=False).returncode == 1


def test_states_that_have_changed_are_found_and_named(folder):
    whole = Rollouts(folder)
    flip(folder / "shard-00001.safetensors")
    flip(folder / "shard-00002.safetensors")
    # Of the right size: only reading it all can tell.
    rollouts = Rollouts(folder)
    with pytest.raises(ValueError, match=r"2 of 6 files of .* shard-00001\.safetensors has changed, shard-00002\.safetensors has changed"):
        rollouts.verify()
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        whole.verify()


def test_rewards_that_have_changed_are_found_on_opening(folder):
    path = folder / "shard-00001.jsonl"
    path.write_text(path.read_text().replace("[2.0]", "[2.5]"))
    with pytest.raises(ValueError, match=r"shard-00001\.jsonl has changed since it was written"):
        Rollouts(folder)


def test_a_manifest_of_other_rollouts_is_refused(folder, tmp_path):
    other = Rollouts.write(tmp_path / "o", [torch.randn(2, 8)] * 3, [0.0] * 3, shard_size=1).path
    shutil.copy(other / "manifest.json", folder / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json does not match checksums\.sha256"):
        Rollouts(folder)
    (folder / "checksums.sha256").unlink()
    with pytest.raises(ValueError, match=r"checksums\.sha256 is missing"):
        Rollouts(folder)


def test_a_manifest_with_fewer_shards_than_there_are_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_shards": 2}))
    with pytest.raises(ValueError, match=r"does not match its shards: found shard-00002\.safetensors, wanted 2 shards"):
        Rollouts(folder)


def test_a_damaged_list_is_refused(folder):
    (folder / "checksums.sha256").write_text("not a checksum\n")
    with pytest.raises(ValueError, match=r"checksums\.sha256, line 1: wanted a checksum"):
        Rollouts(folder)


def test_folders_without_checksums_are_read_but_do_not_verify(folder):
    (folder / "checksums.sha256").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    old = {name: entry for name, entry in manifest.items() if name not in ("checksums_sha256", "storage")}
    (folder / "manifest.json").write_text(json.dumps({**old, "version": 1}))
    rollouts = Rollouts(folder)
    assert rollouts.rewards.tolist() == [[1.0], [2.0], [3.0]]
    with pytest.raises(ValueError, match=r"6 of 6 files .* has no checksum"):
        rollouts.verify()


def test_a_folder_has_checksums_before_it_is_complete(tmp_path):
    writer = RolloutWriter(tmp_path, {"num_shards": 2})
    writer.write(0, torch.ones(2, 4), torch.zeros(2), [2], [RECORD])
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing, the first is shard-00001\.safetensors"):
        writer.finish()
    part = Rollouts(tmp_path, allow_partial=True)
    part.verify()
    assert next(part.records())["prompt"] == "line\u2028break"
    flip(tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match="has changed"):
        part.verify()


def test_a_finish_that_was_interrupted_is_done_again(tmp_path):
    for number in range(2):
        RolloutWriter(tmp_path, {"num_shards": 2}).write(number, torch.ones(2, 4), torch.zeros(2), [2], [RECORD])
    (tmp_path / "shard-00001.sha256").unlink()
    RolloutWriter(tmp_path, {"num_shards": 2}).finish()
    Rollouts(tmp_path).verify()
    before = (tmp_path / "manifest.json").read_bytes()
    RolloutWriter(tmp_path, {"num_shards": 2}).finish()
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_settings_may_change_as_long_as_there_is_no_shard(tmp_path):
    RolloutWriter(tmp_path, {"num_shards": 2, "seed": 1})
    with pytest.raises(ValueError, match="no shard yet"):
        Rollouts(tmp_path, allow_partial=True)
    assert RolloutWriter(tmp_path, {"num_shards": 2, "seed": 2}).manifest["seed"] == 2


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    folder = tmp_path / "r"
    with writing_lock(folder), pytest.raises(RuntimeError, match="another run is writing into"):
        Rollouts.write(folder, [torch.ones(1, 4)], [0.0])
    assert len(Rollouts.write(folder, [torch.ones(1, 4)], [0.0])) == 1


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "r").touch()
    with pytest.raises(ValueError, match="r is a file; rollouts are written into a folder"):
        Rollouts.write(tmp_path / "r", [torch.ones(1, 4)], [0.0])


def test_the_processes_of_one_run_share_a_lock_and_keep_others_out(tmp_path):
    with writing_lock(tmp_path) as share:
        with pytest.raises(RuntimeError), writing_lock(tmp_path, first=False):
            pass
        share()
        with writing_lock(tmp_path, first=False), pytest.raises(RuntimeError), writing_lock(tmp_path):
            pass
    with writing_lock(tmp_path):
        pass


def test_a_shard_that_is_made_anew_may_differ_and_a_kill_while_that_is_noted_is_mended(folder, monkeypatch):
    """On another machine, the same call may round otherwise."""
    (folder / "shard-00001.safetensors").unlink()
    settings = {"base_model": None, "num_prompts": 3, "num_shards": 3}
    writer = RolloutWriter(folder, settings)
    writer.write(1, torch.ones(1, 8), torch.zeros(1), [1], [RECORD])

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("recontrol.data.shards.write_bytes", killed)
        writer.finish()
    assert torch.equal(Rollouts(folder).batch([1]).states, torch.ones(1, 8))
    RolloutWriter(folder, settings).finish()
    Rollouts(folder).verify()
