"""Rollouts that the release before wrote are read, and those that it left unfinished are finished."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol as rc

OLD = Path(__file__).parent / "old_files"
EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
EXPECTED = json.loads((OLD / "expected.json").read_text())
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 4, "batch_size": 2, "seed": 3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def letters(prompts, responses):
    return [float(response.count("e")) for response in responses]


length.name, letters.name = "length", "letters"


@pytest.fixture(scope="module")
def language_model():
    # As it was called when the rollouts were made: the manifest keeps the name.
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype="float32").eval(), AutoTokenizer.from_pretrained(EXAMPLE / "lm")


def lengths_of(rollouts):
    return torch.tensor([[float(len(record["response"]))] for record in rollouts.records()])


def test_written_rollouts():
    rollouts = rc.Rollouts(OLD / "rollouts")
    rollouts.verify()
    assert len(rollouts) == 12 and rollouts.hidden_size == 6 and rollouts.groups.tolist() == [number // 2 for number in range(12)]
    # The reward of each response was the sum of its average state.
    states = rollouts.batch(range(12)).states.split(rollouts.lengths.tolist())
    torch.testing.assert_close(rollouts.rewards[:, 0], torch.stack([each.mean(0).sum() for each in states]))


def test_rewards_that_were_added_and_replaced():
    plain, added, copied = (rc.Rollouts(OLD / name) for name in ("rollouts", "rollouts-relabelled", "rollouts-copied"))
    assert torch.equal(added.rewards, torch.cat([plain.rewards, lengths_of(plain)], 1)) and added.manifest["reward"] == ["reward", "length"]
    assert torch.equal(copied.rewards, lengths_of(plain)) and copied.manifest["reward"] == "length"
    for rollouts in (added, copied):
        rollouts.verify()
        assert torch.equal(rollouts.batch(range(12)).states, plain.batch(range(12)).states)


def test_relabelled_rollouts_are_relabelled_again(tmp_path):
    shutil.copytree(OLD / "rollouts-relabelled", tmp_path / "r")
    before = rc.Rollouts(tmp_path / "r").rewards
    again = rc.relabel(tmp_path / "r", {"twice": lambda prompts, responses: [2 * len(response) for response in responses]}, add=True, progress=False)
    assert torch.equal(again.rewards, torch.cat([before, 2 * lengths_of(again)], 1)) and len(again.manifest["relabelled"]) == 2


def test_a_finished_copy_is_opened_and_one_that_was_stopped_is_finished(tmp_path):
    calls = []

    def counted(prompts, responses):
        calls.append(len(prompts))
        return length(prompts, responses)

    counted.name = "length"
    shutil.copytree(OLD / "rollouts-copied", tmp_path / "copy")
    wanted = rc.Rollouts(tmp_path / "copy").rewards
    assert torch.equal(rc.relabel(OLD / "rollouts", counted, tmp_path / "copy", progress=False).rewards, wanted) and calls == []
    (tmp_path / "copy" / "shard-00002.safetensors").unlink()
    finished = rc.relabel(OLD / "rollouts", counted, tmp_path / "copy", progress=False)
    assert torch.equal(finished.rewards, wanted) and calls
    finished.verify()


def test_collected_rollouts():
    rollouts = rc.Rollouts(OLD / "collected")
    rollouts.verify()
    assert rollouts.rewards.tolist() == EXPECTED["collected"]["rewards"] and rollouts.lengths.tolist() == EXPECTED["collected"]["lengths"]
    assert [record["response"] for record in rollouts.records()] == EXPECTED["collected"]["responses"]


@pytest.mark.parametrize("name", ["collected", "collected-stopped"])
def test_the_same_call_goes_on(language_model, tmp_path, name):
    shutil.copytree(OLD / name, tmp_path / "r")
    prompts = rc.load_prompts(EXAMPLE / "prompts-train.jsonl", limit=4)
    scored = []

    def counted(prompts, responses):
        scored.extend(prompts)
        return letters(prompts, responses)

    counted.name = "letters"
    rollouts = rc.collect(*language_model, prompts, counted, tmp_path / "r", **SAMPLING)
    assert scored == (prompts[2:] if name == "collected-stopped" else [])
    assert rollouts.rewards.tolist() == EXPECTED["collected"]["rewards"]
    assert [record["response"] for record in rollouts.records()] == EXPECTED["collected"]["responses"]
    rollouts.verify()
