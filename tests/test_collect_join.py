import pytest
import torch

from recontrol.data.join import join_rollouts
from recontrol.data.rollouts import Rollouts

MODEL = {"name": "m", "hidden_size": 8, "samples": {"w": [0.5]}}


def write(path, rewards, prompts, *, width=8, seed=0, **options):
    torch.manual_seed(seed)
    states = [torch.randn(length + 1, width).to(options.pop("dtype", torch.float32)) for length in range(len(rewards))]
    ids = [torch.arange(len(rows)) + 100 * seed for rows in states]
    return Rollouts.write(
        path, states, rewards, prompts, [f"r{seed}{index}" for index in range(len(rewards))], token_ids=ids, **{"base_model": MODEL, **options}
    )


@pytest.mark.parametrize("storage", [None, "int8"])
def test_the_parts_are_in_the_whole_and_equal_prompts_are_one_group(tmp_path, storage):
    parts = [
        write(tmp_path / "a", [1.0, 2.0, 3.0], ["p", "q", "p"], groups=[0, 1, 0], storage=storage, shard_size=2),
        write(tmp_path / "b", [4.0, 5.0], ["z", "q"], seed=1, storage=storage),
    ]
    whole = join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert whole.rewards[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert whole.groups.tolist() == [0, 1, 0, 2, 1]
    assert torch.equal(whole.batch(range(5)).states, torch.cat([part.batch(range(len(part))).states for part in parts]))
    assert torch.equal(whole.token_ids(range(5)), torch.cat([part.token_ids(range(len(part))) for part in parts]))
    assert [record["response"] for record in whole.records()] == ["r00", "r01", "r02", "r10", "r11"]
    assert whole.manifest["base_model"] == MODEL and whole.manifest["num_shards"] == 3 and len(whole.manifest["joined"]) == 2
    whole.verify()


def test_without_texts_groups_stay_those_of_their_folder(tmp_path):
    write(tmp_path / "a", [1.0, 2.0], None, groups=[5, 5])
    write(tmp_path / "b", [3.0, 4.0], None, groups=[5, 6])
    assert join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole").groups.tolist() == [0, 0, 1, 2]


def test_a_join_that_was_interrupted_goes_on(tmp_path):
    write(tmp_path / "a", [1.0, 2.0, 3.0], ["p", "q", "p"], shard_size=1)
    write(tmp_path / "b", [4.0], ["p"])
    whole = join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in whole.path.iterdir()}
    (whole.path / "shard-00001.safetensors").unlink()
    join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in whole.path.iterdir()} == wanted
    with pytest.raises(ValueError, match="another"):
        join_rollouts([tmp_path / "a"], tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 9}, "disagree in hidden_size: found 8 and 9"),
        ({"dtype": torch.bfloat16}, "disagree in dtype: found 'float32' and 'bfloat16'"),
        ({"storage": "int8"}, "disagree in storage: found None and 'int8'"),
        ({"rewards": [[1.0, 2.0]]}, "disagree in num_heads: found 1 and 2"),
        ({"base_model": {**MODEL, "samples": {"w": [0.75]}}}, "different language models: 'm' and 'm'"),
    ],
)
def test_folders_that_disagree_are_refused(tmp_path, options, message):
    write(tmp_path / "a", [1.0], ["p"])
    write(tmp_path / "b", prompts=["q"], **{"rewards": [1.0], **options})
    with pytest.raises(ValueError, match=message):
        join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(("name", "entries"), [("tokenizer_sha256", ("1", "2")), ("reward", ("good", "kind"))])
def test_folders_of_other_tokenizers_and_rewards_are_refused(tmp_path, name, entries):
    for folder, entry in zip("ab", entries, strict=True):
        path = write(tmp_path / folder, [1.0], ["p"]).path / "manifest.json"
        path.write_text(path.read_text().replace('"num_prompts"', f'"{name}": "{entry}", "num_prompts"'))
    with pytest.raises(ValueError, match=f"disagree in {name}: found '{entries[0]}' and '{entries[1]}'"):
        join_rollouts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")


def test_a_damaged_part_is_refused(tmp_path):
    shard = write(tmp_path / "a", [1.0], ["p"]).shards[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is not what was written"):
        join_rollouts([tmp_path / "a"], tmp_path / "whole")
    with pytest.raises(ValueError, match="no folders"):
        join_rollouts([], tmp_path / "whole")
