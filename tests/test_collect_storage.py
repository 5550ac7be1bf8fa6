import json

import pytest
import torch
from safetensors import safe_open

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter, decode, encode

LENGTHS = [3, 1, 5, 2]


def random_states(dtype=torch.float32, width=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator).to(dtype) for length in LENGTHS]


def test_eight_bits_are_off_by_half_a_step_at_most():
    states = torch.cat(random_states(width=301)) * torch.logspace(-6, 6, 11)[:, None]
    encoded = encode(states, "int8")
    assert encoded["states"].dtype == torch.int8 and encoded["scales"].shape == (11,)
    step = states.abs().amax(1) / 127
    error = (decode(encoded["states"], encoded["scales"]) - states).abs().amax(1)
    # One part in a million for the rounding of float32 itself.
    assert (error <= step * (0.5 + 1e-4)).all() and (error > step / 10).all()
    # The largest number of a token comes back.
    assert torch.equal(encoded["states"].abs().amax(1), torch.full((11,), 127, dtype=torch.int8))


def test_a_state_of_zeros_stays_zero():
    encoded = encode(torch.zeros(2, 5), "int8")
    assert torch.equal(decode(encoded["states"], encoded["scales"]), torch.zeros(2, 5))
    assert encode(torch.zeros(0, 5), "int8")["states"].shape == (0, 5)


def test_what_a_storage_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(torch.tensor([[1.0, float("nan")]]), "int8")
    with pytest.raises(ValueError, match="do not fit into float16"):
        encode(torch.tensor([[1e30, 1.0]]), "float16")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
def test_states_are_read_back_as_their_storage_keeps_them(tmp_path, storage):
    states = random_states()
    rollouts = Rollouts.write(tmp_path / "r", states, [0.0] * 4, storage=storage, shard_size=3)
    assert rollouts.storage == rollouts.manifest["storage"] == storage
    encoded = encode(torch.cat(states), storage)
    wanted = decode(encoded["states"], encoded.get("scales"))
    found, lengths, _ = rollouts.batch([2, 0])
    assert lengths.tolist() == [5, 3]
    assert torch.equal(found, torch.cat([wanted.split(LENGTHS)[index] for index in (2, 0)]))
    assert found.dtype == (torch.float32 if storage == "int8" else getattr(torch, storage)) == getattr(torch, rollouts.manifest["dtype"])
    assert rollouts.batch([])[0].shape == (0, 64) and rollouts.batch([])[0].dtype == found.dtype
    with safe_open(rollouts.shards[0], "pt") as file:
        assert file.get_tensor("states").dtype == (torch.int8 if storage == "int8" else found.dtype)
    rollouts.verify()


def test_without_a_storage_nothing_is_rounded(tmp_path):
    states = random_states(torch.bfloat16)
    rollouts = Rollouts.write(tmp_path / "r", states, [0.0] * 4)
    assert rollouts.manifest["storage"] is None and rollouts.storage == "bfloat16"
    assert torch.equal(rollouts.batch(range(4)).states, torch.cat(states))


@pytest.mark.parametrize(("storage", "per_token"), [("float32", 256), ("bfloat16", 128), ("int8", 68)])
def test_the_bytes_of_a_token_are_told(tmp_path, storage, per_token):
    rollouts = Rollouts.write(tmp_path / "r", random_states(), [0.0] * 4, storage=storage)
    assert f"4 responses, 11 tokens, states of 64 numbers as {storage}" in rollouts.describe()
    assert f"{per_token} of them states" in rollouts.describe()
    total = sum(path.stat().st_size for path in (tmp_path / "r").glob("shard-*"))
    assert f"{total / 1e6:.1f} MB on disk, {total / rollouts.num_tokens:.0f} bytes a token" in rollouts.describe()


def test_an_unknown_storage_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="unknown storage 'int4'; choose one of 'bfloat16'"):
        Rollouts.write(tmp_path / "r", random_states(), [0.0] * 4, storage="int4")
    assert not (tmp_path / "r").exists()


def test_going_on_with_another_storage_is_refused(tmp_path):
    record = {"index": 0, "prompt": "", "response": "", "reward": [1.0], "finish": "eos"}
    RolloutWriter(tmp_path, {"num_shards": 2}, storage="int8").write(0, torch.ones(1, 4), torch.zeros(1), [1], [record])
    with pytest.raises(ValueError, match="another storage: found 'int8', wanted 'bfloat16'"):
        RolloutWriter(tmp_path, {"num_shards": 2}, storage="bfloat16")


def test_shards_of_eight_bits_need_their_scales(tmp_path):
    rollouts = Rollouts.write(tmp_path / "r", random_states(), [0.0] * 4, storage="int8")
    manifest = json.loads((rollouts.path / "manifest.json").read_text())
    (rollouts.path / "manifest.json").write_text(json.dumps({**manifest, "storage": "bfloat16"}))
    with pytest.raises(ValueError, match=r"not a shard of these rollouts: found .*'scales'"):
        Rollouts(rollouts.path)
