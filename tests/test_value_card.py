"""The model card says what the provenance says, and nothing else."""

import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard

import recontrol as rc
from recontrol.decoding.fingerprint import fingerprint_hash
from recontrol.value.card import CURVE_ROWS, model_card

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = {"name": "somebody/model-7b", "model_type": "llama", "hidden_size": 6, "samples": {"a": [0.5]}}


@pytest.fixture
def card_of(tmp_path):
    """The card of a value function, by way of its folder."""

    def make(value, repo_id=None):
        value.save_pretrained(tmp_path / "saved")
        return model_card(tmp_path / "saved", repo_id)

    return make


def rows(card):
    """The tables of a card, row by row, as lists of cells."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in card.splitlines() if line.startswith("|")]


def row(card, name):
    return next(cells[1:] for cells in rows(card) if cells[0] == name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One epoch on rollouts with two rewards."""
    torch.manual_seed(0)
    states = [torch.randn(2, 6) for _ in range(12)]
    folder = tmp_path_factory.mktemp("card") / "rollouts"
    rollouts = rc.Rollouts.write(folder, states, torch.randn(12), ["p"] * 12, ["x" * number for number in range(12)], base_model=BASE)
    rollouts = rc.relabel(rollouts, {"long": lambda prompts, responses: [len(text) for text in responses]}, add=True, progress=False)
    return rc.train(rollouts, (8,), epochs=3, patience=None, seed=3, progress=False)[0]


def test_the_card_of_a_trained_value_function(card_of, trained):
    card = card_of(trained, "me/value")
    data = ModelCard(card).data
    assert (data.base_model, data.library_name) == ("somebody/model-7b", "recontrol") and "value-function" in data.tags
    assert "# me/value\n" in card and 'rc.ValueFunction.from_pretrained("me/value")' in card
    assert row(card, "base model") == ["`somebody/model-7b`"]
    assert row(card, "fingerprint of the base model, SHA-256") == [f"`{fingerprint_hash(BASE)}`"]
    assert row(card, "network") == ["ReLU perceptron 6 -> 8 -> 2, 74 parameters, float32"]
    assert row(card, "reward of head 0") == ["`reward`"] and row(card, "reward of head 1")[0].startswith("`long: ")
    assert row(card, "responses") == ["12"] and row(card, "seed") == ["3"] and row(card, "epochs") == ["3"]
    assert row(card, "objective") == [trained.provenance["objective"]]
    assert row(card, "checksums sha256") == [trained.provenance["rollouts"]["checksums_sha256"]]


def test_the_learning_curve(card_of, trained):
    card = card_of(trained)
    for entry in trained.provenance["history"]:
        best = " (best)" if entry == trained.provenance["best_epoch"] else ""
        assert row(card, f"{entry['epoch']}{best}")[0] == f"{entry['train_td_loss']:.4g}"
    assert card.count("(best)") == 1


def test_a_long_curve_is_thinned_and_keeps_the_best_and_the_last(card_of):
    history = [{"epoch": epoch, "loss": 1 / (epoch + 1), "correlation": None} for epoch in range(100)]
    card = card_of(rc.ValueFunction(6, (8,), provenance={"history": history, "best_epoch": history[37]}))
    shown = [cells[0] for cells in rows(card) if re.fullmatch(r"\d+( \(best\))?", cells[0])]
    assert len(shown) <= CURVE_ROWS + 1 and "37 (best)" in shown and shown[0] == "0" and shown[-1] == "99"
    assert row(card, "99") == ["0.01", ""]


def test_statistics_of_the_reward_are_named(card_of):
    card = card_of(rc.ValueFunction(6, (8,), 2, reward_mean=[1.5, 0.0], reward_std=[0.25, 2.0]))
    units = [cells[1] for cells in rows(card) if cells[0] == "unit of V"]
    assert units == ["standard deviations of 0.25 from a mean reward of 1.5", "standard deviations of 2 from a mean reward of 0"]
    assert "unit of V" not in card_of(rc.ValueFunction(6, (8,), 2))


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"source": "value_model.pth", "base_model": "a name alone"},
        {"base_model": None, "reward": None, "rollouts": None, "history": None, "data": "films", "training": 3, "best_epoch": []},
        {"base_model": {"name": "a\nb | c"}, "reward": ["x | y"], "history": [{"epoch": 0, "note": "a|b\nc"}, "odd"]},
    ],
    ids=["empty", "released code", "nulls", "marks"],
)
def test_any_provenance_makes_a_card(card_of, provenance):
    card = card_of(rc.ValueFunction(6, (8,), provenance=provenance))
    assert ModelCard(card).data.base_model is None
    for line in card.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert {len(cells) for cells in rows(card)} <= {2}


def test_paths_of_a_machine_are_shortened(card_of, tmp_path):
    (tmp_path / "model").mkdir()
    folder = str(tmp_path / "model")
    rewards = [f"{folder}/rm", f"good: {folder}/rm, template 'Human: {{prompt}} / {{response}}'"]
    provenance = {"base_model": {"name": folder}, "reward": rewards, "rollouts": {"tokenizer": folder}}
    card = card_of(rc.ValueFunction(6, (8,), 2, provenance=provenance))
    assert str(tmp_path) not in card
    assert row(card, "base model") == ["`model`"] and row(card, "tokenizer") == ["model"] and ModelCard(card).data.base_model is None
    assert row(card, "reward of head 0") == ["`rm`"]
    assert row(card, "reward of head 1") == ["`good: rm, template 'Human: {prompt} / {response}'`"]


def test_the_example_in_the_card_is_python(card_of, trained):
    code = re.search(r"```python\n(.*?)```", card_of(trained, "me/value"), re.DOTALL)[1]
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    (weights,) = [keyword.value for keyword in calls["rc.Controller"].keywords if keyword.arg == "head_weights"]
    assert len(ast.literal_eval(weights)) == trained.num_heads
    assert "head_weights" not in card_of(rc.ValueFunction(6, (8,)))
