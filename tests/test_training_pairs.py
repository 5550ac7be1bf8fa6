"""Pairs of responses: which there are, which are refused, and training on them."""

import math

import pytest
import torch
from test_train import same

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter
from recontrol.training import data
from recontrol.training.config import TrainConfig
from recontrol.training.data import stored
from recontrol.training.distributed import Processes
from recontrol.training.objectives.preference import order_scores, preference_loss, preference_pairs
from recontrol.training.objectives.tokens import td_loss
from recontrol.training.train import train
from recontrol.value import ValueFunction

WIDTH = 5
SETTINGS = {"hidden_dims": (8,), "learning_rate": 1e-2, "epochs": 3, "progress": False, "device": "cpu", "objective": "preference"}

pytestmark = pytest.mark.usefixtures("one_thread")


def written(path, lines):
    """Rollouts of (prompt, label, pair, text) lines; the reward is the number of the line."""
    records, states = [], []
    for number, (prompt, label, pair, text) in enumerate(lines):
        extra = {} if label is None else {"preference": label, "pair": pair}
        records.append({"index": prompt, "prompt": "", "response": text, "reward": [float(number)], "finish": "eos", **extra})
        states.append(torch.randn(1 + number % 3, WIDTH))
    writer = RolloutWriter(path, {"base_model": None, "num_prompts": len({prompt for prompt, *_ in lines}), "num_shards": 1})
    lengths = [len(rows) for rows in states]
    writer.write(0, torch.cat(states), torch.full((sum(lengths),), -1), lengths, records)
    return Rollouts(path)


def sampled(path, prompts=12, samples=3, heads=1):
    """Several responses a prompt, rewarded by their last state."""
    states = [torch.randn(1 + number % 4, WIDTH) for number in range(prompts * samples)]
    rewards = torch.stack([rows[-1, :heads] for rows in states])
    return Rollouts.write(path, states, rewards, groups=[number // samples for number in range(prompts * samples)], shard_size=7)


def test_any_two_responses_with_different_rewards_are_a_pair(tmp_path):
    rewards = torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 5.0], [7.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    # Two prompts whose responses are not beside each other, one with a single response and one with equal ones.
    rollouts = Rollouts.write(tmp_path / "r", [torch.zeros(1, 2)] * 6, rewards, groups=[4, 4, 4, 0, 2, 2])
    margin, anchor, generated = preference_pairs(rollouts)
    assert sorted(map(tuple, margin.tolist())) == [(0, 1, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]
    assert sorted(map(tuple, anchor.tolist())) == [(0, 2, 1), (1, 0, 0), (1, 2, 0), (1, 2, 1)]
    assert margin.dtype == anchor.dtype == torch.int64 and generated.all()


def test_labels_overrule_rewards_and_other_responses_are_the_models_own(tmp_path):
    lines = [(0, "chosen", 0, "a"), (0, "rejected", 0, "b"), (1, None, None, "c"), (0, None, None, "d"), (1, None, None, "e")]
    # A second comparison for the first prompt, in which the answer that was preferred comes last.
    lines += [(0, "rejected", 9, "f"), (0, "chosen", 9, "b")]
    margin, anchor, generated = preference_pairs(written(tmp_path / "r", lines))
    assert margin.tolist() == [[0, 1, 0], [6, 5, 0], [4, 2, 0]]
    assert anchor.tolist() == [[3, 0, 0], [3, 6, 0], [2, 4, 0]]
    assert generated.tolist() == [False, False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([(3, "chosen", 0, "a"), (3, "rejected", 0, "a")], "responses 0, chosen, and 1, rejected, to prompt 3 are the same text: there is nothing to prefer"),
        ([(3, "chosen", 0, "a"), (3, "rejected", 1, "b")], r"pair 0 of prompt 3 has responses labelled \['chosen'\], wanted one 'chosen' and one 'rejected'"),
        ([(3, "chosen", 0, "a"), (4, "rejected", 0, "b")], r"pair 0 of prompt 3 has responses labelled \['chosen'\], wanted one 'chosen' and one 'rejected'"),
        ([(3, "chosen", 0, "a"), (3, "chosen", 0, "b")], r"pair 0 of prompt 3 has responses labelled \['chosen', 'chosen'\]"),
        ([(3, "better", 0, "a")], r"pair 0 of prompt 3 has responses labelled \['better'\], wanted one 'chosen'"),
        ([(0, None, None, "a"), (1, None, None, "b")], "has no pair to learn a preference from"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path, lines, message):
    rollouts = written(tmp_path / "r", lines)
    with pytest.raises(ValueError, match=message):
        train(rollouts, out=tmp_path / "v", validation_fraction=0, **SETTINGS)
    assert not (tmp_path / "v").exists()


def test_a_side_of_the_split_without_pairs_is_refused(tmp_path):
    lines = [(0, None, None, "a"), (0, None, None, "b"), (1, None, None, "c")]
    rollouts = written(tmp_path / "r", lines)
    sides = set()
    for seed in range(8):
        with pytest.raises(ValueError, match=r"the prompts (trained on|held out) have no pair; use another seed") as raised:
            train(rollouts, seed=seed, validation_fraction=0.5, **SETTINGS)
        sides.add(str(raised.value).split()[2])
    assert sides == {"trained", "held"}


def test_the_regulariser_needs_responses_of_the_model(tmp_path):
    rollouts = written(tmp_path / "r", [(0, "chosen", 0, "a"), (0, "rejected", 0, "b")])
    with pytest.raises(ValueError, match="preference_regulariser draws the model's own responses to the chosen ones"):
        train(rollouts, validation_fraction=0, preference_regulariser=1.0, **SETTINGS)
    # Without it, and with a regression, which is then on the texts, there is something to train on.
    assert len(train(rollouts, validation_fraction=0, preference_regression=1.0, **SETTINGS)[1]) == 3


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.5, 2.0)], ids=["margin", "all"])
def test_the_gradient_is_that_of_the_formula_however_states_are_read(tmp_path, monkeypatch, weights):
    regression, regulariser = weights
    rollouts = sampled(tmp_path / "r", heads=2)
    tables = preference_pairs(rollouts)[:2]
    value = ValueFunction(WIDTH, (8,), 2).double()
    rewards = rollouts.rewards.double()
    objective = TrainConfig("preference", 0.3 if regression else 0.0, regression, regulariser).new_objective()
    objective.bind(stored(rollouts, Processes(), dtype=torch.float64))
    standardisation = objective.standardisation
    assert torch.equal(standardisation.scale, rewards.std(0, correction=0) if regression else torch.ones(2, dtype=torch.float64))
    batch = torch.tensor([7, 2, 9])
    # By hand, for three prompts at once.
    margins, anchors = (table[torch.isin(rollouts.groups[table[:, 0]], batch)] for table in tables)
    responses = torch.isin(rollouts.groups, batch).nonzero()[:, 0]
    states, lengths, _ = rollouts.batch(responses)
    every = value(states) * standardisation.scale
    last = torch.full((len(rollouts), 2), math.nan, dtype=torch.float64)
    last[responses] = every[lengths.cumsum(0) - 1]
    (first, second, heads), (generated, preferred, own_heads) = margins.T, anchors.T
    margin = preference_loss(last[first, heads], last[second, heads])
    loss = margin + regulariser * (last[generated, own_heads] - last[preferred, own_heads]).square().mean()
    if regression:
        loss = loss + regression * td_loss(every, rewards[responses] - standardisation.mean, lengths, 0.3)
    wanted = torch.autograd.grad(loss, list(value.parameters()))
    for at_once in (10_000, 3):
        monkeypatch.setattr(data, "TOKENS_AT_ONCE", at_once)
        value.zero_grad()
        found, count = objective.backward(value, batch)
        assert count == len(margins) == 18 and found / count == pytest.approx(float(margin.detach()), rel=1e-12)
        for parameter, gradient in zip(value.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)


def test_training_orders_pairs_that_it_has_not_seen(tmp_path, caplog):
    rollouts = sampled(tmp_path / "r", prompts=60)
    value, history = train(rollouts, validation_fraction=0.3, **{**SETTINGS, "epochs": 20})
    best = value.provenance["best_epoch"]
    assert best["validation_preference_loss"] == min(entry["validation_preference_loss"] for entry in history) < 0.5 < math.log(2)
    assert best["validation_preference_accuracy"] > 0.8
    assert history[0].keys() == {"epoch", "train_preference_loss", "validation_preference_loss", "validation_preference_accuracy"}
    assert value.provenance["objective"].startswith("preference margin") and "coin" not in caplog.text
    again, _ = train(rollouts, validation_fraction=0.3, **{**SETTINGS, "epochs": 20})
    assert same(value, again)


def test_a_value_function_that_orders_nothing_is_warned_of(tmp_path, caplog):
    states = [torch.randn(2, WIDTH) for _ in range(60)]
    rollouts = Rollouts.write(tmp_path / "r", states, torch.randn(60), groups=[place // 2 for place in range(60)])
    _, history = train(rollouts, validation_fraction=0.3, **{**SETTINGS, "epochs": 1, "learning_rate": 0.3})
    assert history[0]["validation_preference_accuracy"] <= 0.5
    assert "orders pairs no better than a coin" in caplog.text


def test_regression_reports_its_scores_too(tmp_path):
    _, history = train(sampled(tmp_path / "r"), preference_regression=1.0, validation_fraction=0.3, **SETTINGS)
    assert {"validation_preference_loss", "validation_mc_error", "validation_explained_variance"} <= history[0].keys()


def test_a_run_does_not_go_on_with_other_labels(tmp_path):
    lines = [(0, "chosen", 0, "a"), (0, "rejected", 0, "b"), (1, "chosen", 1, "c"), (1, "rejected", 1, "d")]
    other = [*lines[:2], (1, "rejected", 1, "c"), (1, "chosen", 1, "d")]
    for name, each in (("lines", lines), ("same", lines), ("other", other)):
        torch.manual_seed(0)
        written(tmp_path / name, each)
    settings = {**SETTINGS, "out": tmp_path / "v", "validation_fraction": 0}
    value, _ = train(tmp_path / "lines", **settings)
    assert same(train(tmp_path / "same", **settings)[0], value)
    with pytest.raises(ValueError, match="of a run with another rollouts"):
        train(tmp_path / "other", **settings)


def test_the_score_of_pairs_is_that_of_a_direct_computation():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 0.5, -4.0])
    # Right, wrong, equal, right.
    loss = sum(math.log(1 + math.exp(-gap)) for gap in (1, -3, 0, 4)) / 4
    assert order_scores(chosen, rejected) == pytest.approx({"validation_preference_loss": loss, "validation_preference_accuracy": 2.5 / 4}, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "unknown objective 'dpo'; choose one of 'td', 'td-lambda', 'mc', 'released', 'preference'"),
        ({"objective": "td", "td_lambda": 0.5}, "the objective 'td' has no td_lambda, found 0.5"),
        ({"objective": "released", "td_lambda": 1.0}, "the objective 'released' has no td_lambda, found 1.0"),
        ({"objective": "td-lambda"}, "the objective 'td-lambda' needs td_lambda above 0, such as 0.95; with 0 it is 'td'"),
        ({"objective": "mc", "td_lambda": 0.5}, "the objective 'mc' is td_lambda=1, found td_lambda=0.5"),
        ({"td_lambda": 0.5}, "the objective 'preference' without preference_regression has no td_lambda, found 0.5"),
        ({"objective": "td", "preference_regulariser": 1.0}, "the objective 'td' has no preference_regulariser, found 1.0"),
        ({"preference_regression": -1.0}, "preference_regression must be finite and at least 0, found -1.0"),
        ({"preference_regulariser": math.nan}, "preference_regulariser must be finite and at least 0, found nan"),
        ({"normalise_rewards": True}, "normalise_rewards has no meaning for the objective 'preference' without preference_regression"),
    ],
)
def test_objectives_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(sampled(tmp_path / "r"), out=tmp_path / "v", **{**SETTINGS, **options})
    assert not (tmp_path / "v").exists()
