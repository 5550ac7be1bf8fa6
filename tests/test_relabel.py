"""Scoring rollouts again: what changes, what stays, and what a kill leaves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import recontrol as rc
from recontrol.data.relabel import SCORES_NAME

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, SHARD = 7, 2
PROMPTS = [f"prompt {number // 2}" for number in range(COUNT)]
RESPONSES = ["x" * number for number in range(1, COUNT + 1)]
LENGTHS = torch.arange(1.0, COUNT + 1)[:, None]


def length(prompts, responses):
    return [float(len(response)) for response in responses]


# Rewards that score alike, whatever else they do, say so.
length.identity = "length"


def minus(prompts, responses):
    return [-float(len(response)) for response in responses]


@pytest.fixture
def rollouts(tmp_path):
    torch.manual_seed(0)
    states = [torch.randn(number % 3 + 1, 4) for number in range(COUNT)]
    return rc.Rollouts.write(
        tmp_path / "rollouts", states, torch.arange(float(COUNT)), PROMPTS, RESPONSES, groups=[n // 2 for n in range(COUNT)], shard_size=SHARD
    )


class Interrupted:
    """A reward that fails at its n-th call, and counts."""

    name, identity = "length", "length"

    def __init__(self, at, error=RuntimeError):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, prompts, responses):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("cut")
        return length(prompts, responses)


def assert_only_rewards_differ(new, old, rewards):
    everything = list(range(len(old)))
    assert len(new) == len(old) and torch.equal(new.rewards, rewards)
    assert torch.equal(new.batch(everything).states, old.batch(everything).states) and torch.equal(new.token_ids(everything), old.token_ids(everything))
    assert torch.equal(new.lengths, old.lengths) and torch.equal(new.groups, old.groups)
    for one, other in zip(new.records(), old.records(), strict=True):
        assert {**one, "reward": None} == {**other, "reward": None}
    new.verify()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_a_copy_with_new_rewards(rollouts, tmp_path):
    before = content(rollouts.path)
    new = rc.relabel(rollouts, length, tmp_path / "new", progress=False)
    assert new.path == tmp_path / "new"
    assert_only_rewards_differ(new, rollouts, LENGTHS)
    assert content(rollouts.path) == before
    assert new.manifest["reward"] == "length" and new.manifest["num_heads"] == 1
    (step,) = new.manifest["relabelled"]
    assert step["reward"] == ["length"] and step["before"] == ["reward"] and not step["added"]
    assert step["checksums_before"] == rollouts.manifest["checksums_sha256"]


def test_rollouts_whose_files_are_links(rollouts, tmp_path):
    """As in a cache of the hub: the copy has files, and the links stay."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in rollouts.path.iterdir():
        (linked / path.name).symlink_to(os.path.relpath(path, linked))
    new = rc.relabel(linked, length, tmp_path / "deep" / "new", progress=False)
    assert_only_rewards_differ(new, rollouts, LENGTHS)
    assert not any(path.is_symlink() for path in new.path.iterdir()) and (linked / "manifest.json").is_symlink()


def test_the_copy_outlives_the_old_folder(rollouts, tmp_path):
    old = content(rollouts.path)["shard-00000.safetensors"]
    new = rc.relabel(rollouts, length, tmp_path / "new", progress=False)
    shutil.rmtree(rollouts.path)
    rc.Rollouts(new.path).verify()
    assert content(new.path)["shard-00000.safetensors"] == old


def test_in_place(rollouts, tmp_path):
    shutil.copytree(rollouts.path, tmp_path / "old")
    new = rc.relabel(str(rollouts.path), length, progress=False)
    assert new.path == rollouts.path
    assert_only_rewards_differ(new, rc.Rollouts(tmp_path / "old"), LENGTHS)
    # One file is new, and the manifest, which names it.
    old_files, new_files = content(tmp_path / "old"), content(new.path)
    assert sorted(new_files.keys() - old_files.keys()) == ["rewards-1.safetensors"]
    assert [name for name in old_files if old_files[name] != new_files[name]] == ["manifest.json"]
    again = rc.relabel(new, minus, new.path, progress=False)
    assert_only_rewards_differ(again, rc.Rollouts(tmp_path / "old"), -LENGTHS)
    assert [step["reward"] for step in again.manifest["relabelled"]] == [["length"], ["minus"]]
    assert sorted(content(again.path).keys() - old_files.keys()) == ["rewards-2.safetensors"]


def test_other_files_in_the_folder_stay(rollouts):
    (rollouts.path / "notes.txt").write_text("mine")
    rc.relabel(rollouts, length, progress=False)
    assert (rollouts.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])
def test_heads_are_added(rollouts, tmp_path, in_place):
    new = rc.relabel(rollouts, [length, minus], None if in_place else tmp_path / "new", add=True, progress=False)
    assert_only_rewards_differ(new, rollouts, torch.cat([rollouts.rewards, LENGTHS, -LENGTHS], 1))
    assert new.num_heads == 3 and new.manifest["reward"] == ["reward", "length", "minus"]


def test_several_rewards_replace_one(rollouts):
    new = rc.relabel(rollouts, {"long": length, "short": minus}, progress=False)
    assert torch.equal(new.rewards, torch.cat([LENGTHS, -LENGTHS], 1)) and new.manifest["reward"] == ["long: length", "short: minus"]
    value, _ = rc.train(new, (8,), epochs=1, progress=False)
    assert value.num_heads == 2 and value.provenance["reward"] == ["long: length", "short: minus"]


def test_a_reward_that_is_there_already_is_not_added(rollouts):
    new = rc.relabel(rollouts, length, progress=False)
    with pytest.raises(ValueError, match="has the reward length already; replace the rewards, or give a dictionary with another name"):
        rc.relabel(new, [minus, length], add=True, progress=False)
    assert rc.relabel(new, {"again": length}, add=True, progress=False).manifest["reward"] == ["length", "again: length"]


def test_prompt_and_response_reach_the_reward(rollouts):
    seen = []
    rc.relabel(rollouts, lambda prompts, responses: seen.extend(zip(prompts, responses, strict=True)) or length(prompts, responses), progress=False)
    assert seen == list(zip(PROMPTS, RESPONSES, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])
def test_an_interrupted_run_goes_on_where_it_was(rollouts, tmp_path, in_place, error):
    out = None if in_place else tmp_path / "new"
    before = content(rollouts.path)
    with pytest.raises(error, match="cut"):
        rc.relabel(rollouts, Interrupted(3, error), out, progress=False)
    now = content(rollouts.path)
    assert {name: now[name] for name in before} == before
    assert torch.equal(rc.Rollouts(rollouts.path).rewards, rollouts.rewards)
    second = Interrupted(None)
    new = rc.relabel(rollouts, second, out, progress=False)
    assert second.calls == 2
    assert torch.equal(new.rewards, LENGTHS) and not (new.path / SCORES_NAME).exists()
    new.verify()


def test_a_finished_copy_is_opened(rollouts, tmp_path):
    rc.relabel(rollouts, length, tmp_path / "new", progress=False)
    reward = Interrupted(1)
    assert torch.equal(rc.relabel(rollouts, reward, tmp_path / "new", progress=False).rewards, LENGTHS) and reward.calls == 0


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])
@pytest.mark.parametrize("add", [False, True], ids=["replace", "add"])
@pytest.mark.parametrize("at", ["rewards-1.safetensors", "manifest.json", "scores"])
def test_a_kill_while_the_rewards_are_replaced(rollouts, tmp_path, monkeypatch, at, add, in_place):
    """At every step the rollouts have the old rewards or the new ones, and the same call finishes without scoring anything again."""
    out = rollouts.path if in_place else tmp_path / "new"
    new = torch.cat([rollouts.rewards, LENGTHS], 1) if add else LENGTHS
    replace = os.replace

    def failing(source, target):
        if Path(target) == out / at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "scores":
            patch.setattr("recontrol.data.relabel.shutil.rmtree", failing_remove)
        else:
            patch.setattr("recontrol.files.os.replace", failing)
        rc.relabel(rollouts, length, out, add=add, progress=False)
    if in_place or at == "scores":
        assert torch.equal(rc.Rollouts(out).rewards, new if at == "scores" else rollouts.rewards)
    else:
        with pytest.raises(ValueError, match="is no rollout folder"):
            rc.Rollouts(out)
    reward = Interrupted(None)
    if add and in_place and at == "scores":
        with pytest.raises(ValueError, match="has the reward length already"):
            rc.relabel(rollouts.path, reward, out, add=add, progress=False)
    else:
        assert torch.equal(rc.relabel(rollouts.path, reward, out, add=add, progress=False).rewards, new)
        # Nothing is scored again, unless the call had come to its end and this one is another.
        assert reward.calls == (4 if in_place and at == "scores" else 0)
    rc.Rollouts(out).verify()


def failing_remove(path, **options):
    raise KeyboardInterrupt


def test_scores_that_a_finished_call_left_are_not_in_the_way_of_another_reward(rollouts, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("recontrol.data.relabel.shutil.rmtree", failing_remove)
        rc.relabel(rollouts, length, progress=False)
    assert torch.equal(rc.relabel(rollouts.path, minus, progress=False).rewards, -LENGTHS)


def test_new_rewards_that_have_changed_or_are_missing_are_refused(rollouts):
    path = rc.relabel(rollouts, length, progress=False).path / "rewards-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"rewards-1\.safetensors has changed since it was written"):
        rc.Rollouts(rollouts.path)
    path.unlink()
    with pytest.raises(ValueError, match=r"rewards-1\.safetensors is missing: the manifest names it as the rewards"):
        rc.Rollouts(rollouts.path)


def test_shards_that_the_new_rewards_do_not_go_with_are_refused(rollouts):
    (rc.relabel(rollouts, length, progress=False).path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="has new rewards of 7 responses, its shards have 5"):
        rc.Rollouts(rollouts.path, allow_partial=True)


def test_joined_rollouts_have_the_new_rewards(rollouts, tmp_path):
    rc.relabel(rollouts, length, progress=False)
    joined = rc.join_rollouts([rollouts.path, rollouts.path], tmp_path / "joined")
    assert torch.equal(joined.rewards, LENGTHS.repeat(2, 1)) and joined.manifest["version"] == 2 and "rewards" not in joined.manifest
    assert [record["reward"] for record in joined.records()] == LENGTHS.repeat(2, 1).tolist()
    joined.verify()


def test_an_unfinished_relabelling_with_another_reward_is_not_mixed_in(rollouts):
    with pytest.raises(RuntimeError):
        rc.relabel(rollouts, Interrupted(3), progress=False)
    assert torch.equal(rc.relabel(rollouts, minus, progress=False).rewards, -LENGTHS)
    assert not (rollouts.path / SCORES_NAME).exists()


@pytest.mark.parametrize(
    "reward,message",
    [
        (
            lambda prompts, responses: [float("nan") if "xxx" in r else 1.0 for r in responses],
            r"shard 1: the reward returned NaN or infinity for responses \[0, 1\]",
        ),
        (lambda prompts, responses: [1.0], r"shard 0: .*found 1, wanted 2"),
        (lambda prompts, responses: [[1.0] * (1 + ("xxx" in r)) for r in responses], "shard 1: the reward returned 2 scores a response, and 1 for the shards"),
    ],
    ids=["nan", "count", "heads"],
)
def test_broken_rewards_leave_the_old_ones(rollouts, reward, message):
    before = content(rollouts.path)
    with pytest.raises(ValueError, match=f"{message}.*the shards before it stay in"):
        rc.relabel(rollouts, reward, progress=False)
    now = content(rollouts.path)
    assert {name: now[name] for name in before} == before and torch.equal(rc.Rollouts(rollouts.path).rewards, rollouts.rewards)


def test_an_added_reward_must_say_how_many_it_is(rollouts):
    with pytest.raises(ValueError, match="returned 2 scores a response; to be added it must return one, or name them in head_names"):
        rc.relabel(rollouts, lambda prompts, responses: [[1.0, 2.0]] * len(responses), add=True, progress=False)


def test_rollouts_without_texts(tmp_path):
    rollouts = rc.Rollouts.write(tmp_path / "silent", [torch.ones(1, 4)], [1.0])
    with pytest.raises(ValueError, match="has no texts to score"):
        rc.relabel(rollouts, length, progress=False)


def test_a_folder_of_something_else(rollouts, tmp_path):
    with pytest.raises(ValueError, match="is no rollout folder"):
        rc.relabel(tmp_path / "nothing", length, progress=False)
    assert not (tmp_path / "nothing").exists()
    other = rc.Rollouts.write(tmp_path / "other", [torch.ones(1, 4)], [1.0], ["p"], ["r"])
    with pytest.raises(ValueError, match="holds rollouts with another"):
        rc.relabel(rollouts, length, other.path, progress=False)
    with pytest.raises(TypeError, match="found float"):
        rc.relabel(rollouts, 1.0, progress=False)


def test_an_incomplete_folder(rollouts):
    (rollouts.path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="is not complete: found 3 of 4 shards"):
        rc.relabel(rollouts.path, length, progress=False)


def test_a_second_run_is_refused(rollouts):
    def again(prompts, responses):
        with pytest.raises(RuntimeError, match="another run is writing into"):
            rc.relabel(rollouts.path, minus, progress=False)
        return length(prompts, responses)

    assert torch.equal(rc.relabel(rollouts, again, progress=False).rewards, LENGTHS)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])
def test_without_hard_links(rollouts, tmp_path, monkeypatch, in_place):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr("recontrol.data.relabel.os.link", refuse)
    new = rc.relabel(rollouts, length, None if in_place else tmp_path / "new", progress=False)
    assert torch.equal(new.rewards, LENGTHS) and not any(path.is_symlink() for path in new.path.rglob("*"))
    new.verify()


def test_eight_bit_states_are_shared_as_they_are(tmp_path):
    states = [torch.randn(3, 4) for _ in range(3)]
    old = rc.Rollouts.write(tmp_path / "old", states, [1.0, 2.0, 3.0], ["p"] * 3, ["a", "bb", "ccc"], storage="int8")
    new = rc.relabel(old, length, tmp_path / "new", progress=False)
    assert_only_rewards_differ(new, old, torch.tensor([[1.0], [2.0], [3.0]]))
    assert new.storage == "int8"


def test_rollouts_of_format_version_1(rollouts):
    """Their shards have no checksums, and relabelling does not make up any; the new rewards have one."""
    (rollouts.path / "checksums.sha256").unlink()
    manifest = json.loads((rollouts.path / "manifest.json").read_text())
    kept = {name: entry for name, entry in manifest.items() if name not in ("checksums_sha256", "storage")}
    (rollouts.path / "manifest.json").write_text(json.dumps(kept | {"version": 1}))
    new = rc.relabel(rollouts.path, length, progress=False)
    assert torch.equal(new.rewards, LENGTHS) and len(new.manifest["rewards"]["sha256"]) == 64
    with pytest.raises(ValueError, match=r"8 of 8 files .* has no checksum"):
        new.verify()


def test_names_of_paths_are_not_resolved_away(rollouts, tmp_path):
    (tmp_path / "link").symlink_to(rollouts.path)
    assert rc.relabel(tmp_path / "link", length, rollouts.path, progress=False).path == tmp_path / "link"
    assert torch.equal(rc.Rollouts(rollouts.path).rewards, LENGTHS) and Path(tmp_path / "link").is_symlink()
