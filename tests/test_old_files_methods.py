"""A direction, an adapter and an evaluation that the release before wrote are read, and continue."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol as rc
from recontrol.data.prompts import Preference
from recontrol.evaluation.evaluate import evaluate
from recontrol.evaluation.measure import Measure
from recontrol.methods import Direction, FineTuned, reward_direction, train_dpo
from recontrol.methods.adapters import adapter

OLD = Path(__file__).parent / "old_files"
EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# What `train_dpo` was called with.
PAIRS = [Preference("This film is", " a great success", " a failure"), Preference("The actors", " are wonderful", " never try")]
DPO = {"rank": 1, "target_modules": ["q_proj"], "learning_rate": 1e-2, "batch_size": 2, "epochs": 3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


# As the files name it.
NAME = "examples/movie_reviews/lm"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(EXAMPLE.parent.parent)
        return AutoModelForCausalLM.from_pretrained(NAME, dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(EXAMPLE.parent.parent)
        return AutoTokenizer.from_pretrained(NAME)


def letters(prompts, responses):
    return [float(response.count("e")) for response in responses]


letters.name = "letters"


def evaluated(model, tokenizer, folder):
    """The evaluation that the release before made."""
    prompts = rc.load_prompts(EXAMPLE / "prompts-train.jsonl", limit=4)
    value = rc.ValueFunction.from_pretrained(OLD / "value-model")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 4, "batch_size": 2, "seed": 3, "stop_strings": ["\n"]}
    return evaluate(model, tokenizer, prompts, value=value, settings=[(0.5, 3)], reward=letters, out=folder, progress=False, **sampling)


def compare(rows):
    assert len(rows) == len(EXPECTED["evaluation"]) == 2
    for row, wanted in zip(rows, EXPECTED["evaluation"], strict=True):
        assert (row.method, row.reward, row.responses) == (wanted["method"], wanted["reward"], wanted["responses"])
        assert row.nll == pytest.approx(wanted["nll"], rel=1e-5) and row.kl == pytest.approx(wanted["kl"], rel=1e-3, abs=1e-5)


def test_a_finished_evaluation_is_read(model, tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(OLD / "evaluation", tmp_path / "evaluation")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(Measure, "__call__", lambda *arguments, **keywords: pytest.fail("a cell was made again"))
    compare(evaluated(model, tokenizer, folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_was_stopped_continues(model, tokenizer, tmp_path):
    folder = shutil.copytree(OLD / "evaluation", tmp_path / "evaluation")
    (cell,) = folder.glob("re-control-*/seed-3-batch-00001.json")
    wanted = json.loads(cell.read_text())
    cell.unlink()
    compare(evaluated(model, tokenizer, folder))
    found = json.loads(cell.read_text())
    assert found.keys() == wanted.keys() | {"reward"} and len(list(folder.rglob("*.json"))) == 5
    for answer, other in zip(found["answers"], wanted["answers"], strict=True):
        assert answer.keys() == other.keys() and answer["text"] == other["text"]
        assert answer["values"] == pytest.approx(other["values"], rel=1e-4, abs=1e-5)


def test_a_direction_is_read():
    direction = Direction.load(OLD / "direction.safetensors")
    again = reward_direction(OLD / "collected")
    assert direction.origin == again.origin == "reward regression"
    assert torch.allclose(direction.vector, again.vector, rtol=1e-4, atol=1e-5 * direction.vector.abs().max().item())
    assert direction.provenance.keys() == again.provenance.keys()


def test_an_adapter_is_read_and_not_trained_again(model, tokenizer):
    method = FineTuned(OLD / "adapter")
    assert method.label == "LoRA DPO (beta 0.1, learning rate 0.01)"
    assert method.training == (3072, 1.9895001820000289, 43425792)
    ids = tokenizer("This film is", return_tensors="pt").input_ids
    with torch.no_grad(), adapter(model, method.path):
        logits = model(ids).logits[0, -1, :4]
    assert logits.tolist() == pytest.approx([-7.974143, -2.335174, -3.783401, -0.515125], rel=1e-4)
    assert train_dpo(model, tokenizer, PAIRS, OLD / "adapter", **DPO) == method.run
