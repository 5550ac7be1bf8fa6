import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter

LENGTHS = [3, 1, 5, 2, 7]


def random_states(dtype=torch.bfloat16, width=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator).to(dtype) for length in LENGTHS]


@pytest.fixture
def folder(tmp_path):
    ids = list(torch.arange(sum(LENGTHS)).split(LENGTHS))
    Rollouts.write(tmp_path / "r", random_states(), [1.0, 2.0, 3.0, 4.0, 5.0], groups=[0, 0, 1, 1, 2], token_ids=ids, shard_size=2)
    return tmp_path / "r"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shard_size", [1, 2, 5, 100])
def test_what_is_written_is_read(tmp_path, dtype, shard_size):
    states = random_states(dtype)
    rewards = torch.arange(10.0).reshape(5, 2)
    written = Rollouts.write(tmp_path / "r", states, rewards, ["p"] * 5, list("abcde"), groups=[4, 4, 0, 1, 1], shard_size=shard_size, base_model={"a": 1})
    rollouts = Rollouts(tmp_path / "r")
    assert len(rollouts) == len(written) == 5
    assert (rollouts.num_tokens, rollouts.hidden_size, rollouts.num_heads) == (18, 8, 2)
    assert rollouts.lengths.tolist() == LENGTHS
    assert rollouts.groups.tolist() == [4, 4, 0, 1, 1]
    assert torch.equal(rollouts.rewards, rewards)
    assert rollouts.manifest["base_model"] == {"a": 1}
    assert [record["response"] for record in rollouts.records()] == list("abcde")
    for indices in ([0], [4, 0, 3], torch.tensor([2, 2, 1]), range(5)):
        batch, lengths, scores = rollouts.batch(indices)
        assert batch.dtype == dtype
        assert torch.equal(batch, torch.cat([states[int(index)] for index in indices]))
        assert lengths.tolist() == [LENGTHS[int(index)] for index in indices]
        assert torch.equal(scores, rewards[torch.as_tensor(indices)])


def test_an_empty_batch_has_the_width_and_dtype_of_the_states(folder):
    states, lengths, rewards = Rollouts(folder).batch([])
    assert states.shape == (0, 8) and states.dtype == torch.bfloat16
    assert lengths.shape == (0,) and rewards.shape == (0, 1)


def test_token_ids_go_with_their_states(folder):
    assert Rollouts(folder).token_ids([3, 0]).tolist() == [9, 10, 0, 1, 2]


def test_a_batch_holds_no_more_memory_than_its_rows(folder):
    states, _, _ = Rollouts(folder).batch([1])
    assert states.untyped_storage().nbytes() == 8 * 2


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_a_shard_cut_in_the_middle_is_named(folder, size):
    shard = folder / "shard-00001.safetensors"
    whole = shard.stat().st_size
    os.truncate(shard, size if size >= 0 else whole + size)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged or not a shard of rollouts .*; delete it and collect again"):
        Rollouts(folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(4, 4)},
        {"states": torch.zeros(8, 8, dtype=torch.float32), "token_ids": torch.zeros(8, dtype=torch.int64), "offsets": torch.tensor([0, 3, 8])},
        {"states": torch.zeros(8, 9, dtype=torch.bfloat16), "token_ids": torch.zeros(8, dtype=torch.int64), "offsets": torch.tensor([0, 3, 8])},
        {"states": torch.zeros(8, 8, dtype=torch.bfloat16), "token_ids": torch.zeros(7, dtype=torch.int64), "offsets": torch.tensor([0, 3, 8])},
        {"states": torch.zeros(8, 8, dtype=torch.bfloat16), "token_ids": torch.zeros(8, dtype=torch.int64), "offsets": torch.tensor([0, 3, 7])},
        {"states": torch.zeros(8, 8, dtype=torch.bfloat16), "token_ids": torch.zeros(8, dtype=torch.int64), "offsets": torch.tensor([0, 8, 8])},
        {"states": torch.zeros(()), "token_ids": torch.zeros(()), "offsets": torch.zeros(())},
    ],
    ids=["foreign", "dtype", "width", "token ids", "end", "empty response", "scalars"],
)
def test_a_foreign_safetensors_file_is_refused(folder, tensors):
    save_file(tensors, folder / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
        Rollouts(folder)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}"])
def test_a_shard_that_is_no_safetensors_file_is_refused(folder, content):
    (folder / "shard-00001.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
        Rollouts(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "missing"),
        ('{"index": 0, "reward": [1.0]}\n', "found 1 lines, wanted 2"),
        ('{"index": 0, "reward": [1.0]}\n{"index": 0, "rew', "damaged"),
        ('{"index": 0, "reward": [1.0]}\n{"index": 0, "reward": [NaN]}\n', "line 2.*finite"),
        ('{"index": 0, "reward": [1.0]}\n{"index": 0, "reward": [1.0, 2.0]}\n', "line 2.*wanted 1"),
        ('{"index": 0, "reward": [1.0]}\n{"index": 0}\n', "reward"),
    ],
)
def test_lines_that_do_not_go_with_their_shard_are_refused(folder, lines, message):
    path = folder / "shard-00000.jsonl"
    if lines is None:
        path.unlink()
    else:
        path.write_text(lines)
    with pytest.raises(ValueError, match=message) as raised:
        Rollouts(folder)
    assert "shard-00000.jsonl" in str(raised.value)


def test_an_interrupted_folder_is_opened_only_on_request(folder):
    whole = Rollouts(folder)
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="found 2 of 3 shards"):
        Rollouts(folder)
    part = Rollouts(folder, allow_partial=True)
    assert part.lengths.tolist() == [3, 1, 7]
    assert torch.equal(part.batch([2])[0], whole.batch([4])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "found format 'other', wanted 'recontrol.rollouts'"),
        ({"version": 4}, "version 4.*upgrade"),
        ({"hidden_size": 16}, "not a shard of these rollouts"),
        ({"dtype": "float16"}, "not a shard of these rollouts"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=message):
        Rollouts(folder)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rollout folder: manifest\.json is missing"):
        Rollouts(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        Rollouts(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "recontrol.rollouts", "version": 1}')
    with pytest.raises(ValueError, match="lacks hidden_size, dtype, num_heads, num_shards"):
        Rollouts(tmp_path)


def test_writing_refuses_what_would_not_read_back(tmp_path, folder):
    states = random_states()
    with pytest.raises(ValueError, match=r"responses \[1, 3\] are not finite"):
        Rollouts.write(tmp_path / "n", states, [0.0, float("nan"), 0.0, float("inf"), 0.0])
    with pytest.raises(ValueError, match="found 4 entries of reward, wanted 5"):
        Rollouts.write(tmp_path / "n", states, [0.0] * 4)
    with pytest.raises(ValueError, match="found 2 entries of prompt, wanted 5"):
        Rollouts.write(tmp_path / "n", states, [0.0] * 5, ["a", "b"])
    with pytest.raises(ValueError, match="no responses"):
        Rollouts.write(tmp_path / "n", [], [])
    with pytest.raises(ValueError, match="lengths"):
        Rollouts.write(tmp_path / "n", [*states, torch.empty(0, 8, dtype=torch.bfloat16)], [0.0] * 6)
    with pytest.raises(ValueError, match="already holds rollouts"):
        Rollouts.write(folder, states, [0.0] * 5)


def test_later_shards_must_be_of_the_same_kind(tmp_path):
    writer = RolloutWriter(tmp_path, {"num_shards": 3})
    ids = torch.zeros(2, dtype=torch.int64)
    record = {"index": 0, "prompt": "", "response": "", "reward": [1.0], "finish": "eos"}
    writer.write(0, torch.zeros(2, 4), ids, [2], [record])
    with pytest.raises(ValueError, match="another hidden_size: found 4, wanted 5"):
        writer.write(1, torch.zeros(2, 5), ids, [2], [record])
    with pytest.raises(ValueError, match="another dtype: found 'float32', wanted 'float64'"):
        writer.write(1, torch.zeros(2, 4).double(), ids, [2], [record])
    with pytest.raises(ValueError, match="another num_heads: found 1, wanted 2"):
        writer.write(1, torch.zeros(2, 4), ids, [2], [{**record, "reward": [1.0, 2.0]}])
    assert not writer.has(1)


def test_a_shard_may_have_no_response(tmp_path):
    writer = RolloutWriter(tmp_path, {"num_shards": 2})
    writer.write(0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], [])
    assert writer.manifest["num_heads"] is None
    record = {"index": 0, "prompt": "", "response": "", "reward": [1.0, 2.0], "finish": "eos"}
    writer.write(1, torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), [2], [record])
    rollouts = Rollouts(tmp_path)
    assert rollouts.rewards.tolist() == [[1.0, 2.0]]
    assert torch.equal(rollouts.batch([0])[0], torch.ones(2, 4))


def test_other_settings_are_named(tmp_path):
    record = {"index": 0, "prompt": "", "response": "", "reward": [1.0], "finish": "eos"}
    RolloutWriter(tmp_path, {"num_shards": 1, "seed": 1, "free": 1}).write(0, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), [1], [record])
    with pytest.raises(ValueError, match="another seed: found 1, wanted 2"):
        RolloutWriter(tmp_path, {"num_shards": 1, "seed": 2, "free": 1})
    assert RolloutWriter(tmp_path, {"num_shards": 1, "seed": 1, "free": 2}, ignored=("free",)).has(0)


def test_shards_without_a_manifest_are_refused(tmp_path):
    (tmp_path / "shard-00000.safetensors").touch()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        RolloutWriter(tmp_path, {"num_shards": 1})


def test_only_the_temporary_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    live = tmp_path / f".shard-00000.jsonl.{os.getppid()}.part"
    left = [tmp_path / f".shard-00000.safetensors.{dead}.part", tmp_path / f".manifest.json.{dead}.part", tmp_path / f".shard-00000.jsonl.{os.getpid()}.part"]
    other = tmp_path / ".notes.part"
    for path in (live, other, *left):
        path.touch()
    RolloutWriter(tmp_path, {"num_shards": 1})
    assert sorted(tmp_path.iterdir()) == sorted([live, other, tmp_path / "manifest.json"])
