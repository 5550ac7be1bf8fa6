import copy
import json
import weakref

import pytest
import torch

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter
from recontrol.training import data
from recontrol.training.config import TrainConfig
from recontrol.training.data import split_by_prompt, stored
from recontrol.training.distributed import Processes
from recontrol.training.loop import Learner
from recontrol.training.objectives.tokens import held_out_scores, released_loss, td_loss
from recontrol.training.train import initial_value, train
from recontrol.value import ValueFunction

SETTINGS = {"hidden_dims": (8,), "learning_rate": 1e-2, "epochs": 3, "batch_size": 8, "progress": False, "device": "cpu"}
WIDTH = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def made(path, heads=1, responses=40, dtype=torch.float32, noise=0.5, **keywords):
    """Four responses a prompt; the reward is known in part from the states."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 8, (responses,), generator=generator).tolist()
    states = [torch.randn(length, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator) for length in lengths]
    means = torch.stack([rows.mean(0) for rows in states])
    rewards = 3 + means @ torch.randn(WIDTH, heads, generator=generator) + noise * torch.randn(responses, heads, generator=generator)
    groups = [index // 4 for index in range(responses)]
    return Rollouts.write(path, [rows.to(dtype) for rows in states], keywords.pop("rewards", rewards), groups=groups, shard_size=16, **keywords)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return made(tmp_path_factory.mktemp("data") / "r")


def weights_of(value):
    return torch.cat([parameter.detach().flatten() for parameter in value.parameters()])


def same(value, other):
    return value.state_dict().keys() == other.state_dict().keys() and torch.equal(weights_of(value), weights_of(other))


def test_one_seed_one_result_and_the_callers_generator_is_left_alone(rollouts):
    before = torch.get_rng_state()
    value, history = train(rollouts, seed=3, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, history_again = train(rollouts.path, seed=3, **SETTINGS)
    assert same(value, again) and history == history_again
    other, other_history = train(rollouts, seed=4, **SETTINGS)
    assert not same(value, other) and history != other_history


def flat(batches):
    return [index for batch in batches for index in batch]


def recorded_updates(monkeypatch):
    batches = []
    update = Learner.update

    def recording(self, objective, batch, learning_rate):
        batches.append(batch.tolist())
        return update(self, objective, batch, learning_rate)

    monkeypatch.setattr(Learner, "update", recording)
    return batches


def test_the_seed_decides_the_weights_and_the_order(rollouts, monkeypatch):
    data = stored(rollouts, Processes())
    starts = [initial_value(data, TrainConfig(hidden_dims=(8,), seed=seed)) for seed in (0, 0, 1)]
    assert same(starts[0], starts[1]) and not same(starts[0], starts[2])
    orders = []
    for seed in (0, 0, 1):
        with monkeypatch.context() as patch:
            batches = recorded_updates(patch)
            train(rollouts, seed=seed, validation_fraction=0, **{**SETTINGS, "epochs": 1})
        orders.append(flat(batches))
    assert orders[0] == orders[1] != orders[2]


def test_an_epoch_is_all_whole_responses_once_in_an_order_of_its_own(rollouts, monkeypatch):
    batches = recorded_updates(monkeypatch)
    train(rollouts, **{**SETTINGS, "batch_size": 7, "epochs": 2})
    held_in, _ = split_by_prompt(rollouts.groups, 0.1, 0)
    # 36 responses in mini-batches of at most 7, of nearly equal size.
    assert [len(batch) for batch in batches] == [6] * 12
    first, second = flat(batches[:6]), flat(batches[6:])
    assert sorted(first) == sorted(second) == held_in.tolist()
    assert first != second and first != held_in.tolist()
    other = recorded_updates(monkeypatch)
    train(rollouts, seed=1, **{**SETTINGS, "batch_size": 36, "epochs": 1, "validation_fraction": 0})
    assert [len(batch) for batch in other] == [20, 20]


def test_mini_batches_are_a_twentieth_of_the_data_and_at_most_the_papers(rollouts, monkeypatch, tmp_path):
    batches = recorded_updates(monkeypatch)
    value, _ = train(rollouts, **{**SETTINGS, "batch_size": None, "epochs": 1, "validation_fraction": 0})
    assert value.provenance["training"]["batch_size"] == 2 and [len(batch) for batch in batches] == [2] * 20
    # 36 responses are trained on: 36 // 20 = 1.
    assert train(rollouts, **{**SETTINGS, "batch_size": None, "epochs": 1})[0].provenance["training"]["batch_size"] == 1
    monkeypatch.setattr("recontrol.training.train.LARGEST_BATCH", 30)
    many = Rollouts.write(tmp_path / "r", [torch.randn(1, 2) for _ in range(700)], torch.randn(700))
    assert train(many, **{**SETTINGS, "batch_size": None, "epochs": 1, "validation_fraction": 0})[0].provenance["training"]["batch_size"] == 30


def test_the_prompts_held_out_are_not_trained_on(rollouts, monkeypatch):
    batches = recorded_updates(monkeypatch)
    value, _ = train(rollouts, seed=5, validation_fraction=0.3, **SETTINGS)
    trained = rollouts.groups[torch.tensor(flat(batches))].unique()
    assert len(trained) == 7
    assert value.provenance["data"] == {"responses": 40, "tokens": rollouts.num_tokens, "trained_on": 28, "held_out": 12}


@pytest.mark.parametrize(("fraction", "prompts"), [(0.01, 1), (0.3, 3), (0.25, 2), (0.99, 9)])
def test_the_split_keeps_the_responses_to_a_prompt_together(fraction, prompts):
    # Of different numbers of responses, out of order, with gaps in the numbers.
    groups = torch.tensor([30, 3, 3, 50, 4, 11, 6, 7, 8, 9, 10, 3, 30, 50, 50])
    held_in, held_out = split_by_prompt(groups, fraction, 0)
    assert sorted(torch.cat([held_in, held_out]).tolist()) == list(range(15))
    assert not set(groups[held_in].tolist()) & set(groups[held_out].tolist())
    assert len(groups[held_out].unique()) == prompts
    assert torch.equal(held_out, split_by_prompt(groups, fraction, 0)[1])
    assert len({tuple(split_by_prompt(groups, fraction, seed)[1].tolist()) for seed in range(20)}) > 1


def test_early_stopping_keeps_the_weights_of_the_best_epoch(tmp_path):
    noisy = made(tmp_path / "r", noise=3.0)
    options = {**SETTINGS, "epochs": 60, "learning_rate": 3e-2, "validation_fraction": 0.3}
    value, history = train(noisy, patience=4, **options)
    errors = [entry["validation_mc_error"] for entry in history]
    best = errors.index(min(errors))
    assert best > 0 and len(history) == best + 1 + 4 < 60
    assert [entry["epoch"] for entry in history] == list(range(len(history)))
    assert value.provenance["best_epoch"] == history[best]
    # They are those after that epoch, to the bit.
    until_best, short = train(noisy, patience=None, **{**options, "epochs": best + 1})
    assert same(value, until_best) and short == history[: best + 1]
    # Without patience it goes on to the end, with the same choice among more.
    _, everything = train(noisy, patience=None, **options)
    assert len(everything) == 60 and everything[: len(history)] == history


def test_the_history_is_what_the_value_function_scores_on_the_prompts_held_out(rollouts):
    value, history = train(rollouts, validation_fraction=0.3, td_lambda=0.5, dtype=torch.float64, **SETTINGS)
    held_in, held_out = split_by_prompt(rollouts.groups, 0.3, 0)
    states, lengths, rewards = rollouts.batch(held_out)
    scores = held_out_scores(value(states), rewards.double(), lengths, rollouts.rewards[held_in].mean(0), 0.5)
    # In float64, but for `flat`, a float32 mean here: 36 roundings of 6e-8.
    assert {"epoch": value.provenance["best_epoch"]["epoch"], **scores} == pytest.approx(
        {name: number for name, number in value.provenance["best_epoch"].items() if name != "train_td_loss"}, rel=1e-5
    )
    assert value.provenance["best_epoch"] in history


def test_the_training_loss_is_in_squared_units_of_the_reward(rollouts):
    """With one mini-batch, that of the first epoch is of a V that is the mean reward everywhere."""
    _, history = train(rollouts, **{**SETTINGS, "epochs": 1, "batch_size": 40, "validation_fraction": 0, "dtype": torch.float64})
    rewards = rollouts.rewards.double()
    # Only the last token of a response has another target than the mean; inside, rewards were standardised: a few roundings.
    assert history == [{"epoch": 0, "train_td_loss": pytest.approx(float((rewards - rewards.mean()).square().sum()) / rollouts.num_tokens, rel=1e-12)}]


def test_another_unit_of_the_reward_is_another_unit_of_the_value(tmp_path, rollouts):
    states = list(rollouts.batch(range(40))[0].split(rollouts.lengths.tolist()))
    scaled = Rollouts.write(tmp_path / "r", states, rollouts.rewards * 1024, groups=rollouts.groups)
    value, history = train(rollouts, **SETTINGS)
    other, other_history = train(scaled, **SETTINGS)
    # A power of two is exact in floating point.
    assert torch.equal(other(states[0]), value(states[0]) * 1024)
    assert [entry["validation_mc_error"] for entry in other_history] == [entry["validation_mc_error"] * 1024**2 for entry in history]


def test_without_validation_all_is_trained_on_and_the_last_weights_are_kept(rollouts, monkeypatch):
    batches = recorded_updates(monkeypatch)
    value, history = train(rollouts, validation_fraction=0, patience=1, **SETTINGS)
    assert len(history) == 3 and all(entry.keys() == {"epoch", "train_td_loss"} for entry in history)
    assert sorted(flat(batches[:5])) == list(range(40))
    assert value.provenance["best_epoch"]["epoch"] == 2
    assert not same(value, train(rollouts, validation_fraction=0, **{**SETTINGS, "epochs": 2})[0])


def test_each_head_is_trained_as_if_alone(tmp_path):
    both = made(tmp_path / "both", heads=2)
    value, _ = train(both, **{**SETTINGS, "hidden_dims": ()})
    assert value.num_heads == 2
    states = list(both.batch(range(40))[0].split(both.lengths.tolist()))
    for head in range(2):
        alone = Rollouts.write(tmp_path / str(head), states, both.rewards[:, head], groups=both.groups)
        own, _ = train(alone, **{**SETTINGS, "hidden_dims": ()})
        # All are still learning, so that the best epoch of both heads together is that of each.
        assert own.provenance["best_epoch"]["epoch"] == value.provenance["best_epoch"]["epoch"] == 2
        # A linear V shares no weights between heads, and Adam's step does not depend on the scale of the loss
        # (half of it, for two heads) but by its eps, 1e-8 of gradients of 1e-2 and more in each of 15 steps.
        torch.testing.assert_close(value(states[0])[:, head], own(states[0])[:, 0], rtol=1e-4, atol=1e-4)


def test_more_than_one_hidden_layer(rollouts):
    value, history = train(rollouts, **{**SETTINGS, "hidden_dims": [8, 5], "td_lambda": 1.0, "epochs": 20})
    assert value.hidden_dims == (8, 5)
    assert history[-1]["train_td_loss"] < 0.7 * history[0]["train_td_loss"]
    assert history[-1]["validation_explained_variance"] > 0.1


@pytest.mark.parametrize("constant", [0.1, -3.0])
def test_constant_rewards_are_warned_of_and_learned(tmp_path, caplog, constant):
    data = made(tmp_path / "r", rewards=[constant] * 40)
    value, history = train(data, **SETTINGS)
    assert "all rewards of heads [0] are the same" in caplog.text
    assert torch.equal(value(data.batch([0])[0]).detach(), torch.full((int(data.lengths[0]), 1), constant))
    assert [entry["validation_mc_error"] for entry in history] == [0, 0, 0]
    assert {entry["validation_explained_variance"] for entry in history} == {entry["validation_correlation"] for entry in history} == {None}
    caplog.clear()
    train(made(tmp_path / "two", rewards=torch.stack([torch.randn(40), torch.full((40,), constant)], 1)), **SETTINGS)
    assert "all rewards of heads [1] are the same" in caplog.text


def test_a_value_function_that_predicts_nothing_is_warned_of(tmp_path, caplog, rollouts):
    train(rollouts, **{**SETTINGS, "epochs": 20, "td_lambda": 1.0})
    assert "no better than their mean" not in caplog.text
    _, history = train(made(tmp_path / "r", rewards=torch.randn(40)), **{**SETTINGS, "epochs": 1, "learning_rate": 0.3})
    assert history[0]["validation_explained_variance"] < 0
    assert "predicts rewards no better than their mean" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_may_be_stored_in_any_dtype(tmp_path, dtype):
    """The weights stay float32, and the result is that of the same numbers stored as float32."""
    stored = made(tmp_path / "stored", dtype=dtype)
    states = list(stored.batch(range(40))[0].split(stored.lengths.tolist()))
    assert states[0].dtype == dtype
    value, history = train(stored, **SETTINGS)
    assert value.dtype == torch.float32
    single = Rollouts.write(tmp_path / "single", [rows.float() for rows in states], stored.rewards, groups=stored.groups)
    other, other_history = train(single, **SETTINGS)
    assert same(value, other) and history == other_history


def test_weights_of_double_precision(rollouts, tmp_path):
    value, _ = train(rollouts, out=tmp_path / "v", dtype=torch.float64, **SETTINGS)
    single, _ = train(rollouts, **SETTINGS)
    assert value.dtype == torch.float64 and single.dtype == torch.float32
    assert ValueFunction.from_pretrained(tmp_path / "v").dtype == torch.float64
    # 15 steps of Adam from the same weights: rounding of 6e-8 each, enlarged where a gradient is small against its neighbours.
    states = rollouts.batch([0, 5])[0]
    torch.testing.assert_close(value(states), single(states).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 50])
def test_states_are_read_a_few_at_a_time_and_let_go(rollouts, monkeypatch, at_once):
    reads, alive = [], []
    batch = Rollouts.batch

    def recording(self, indices):
        alive.append(sum(reference() is not None for _, reference in reads))
        states, lengths, rewards = batch(self, indices)
        reads.append((lengths.tolist(), weakref.ref(states)))
        return states, lengths, rewards

    monkeypatch.setattr(Rollouts, "batch", recording)
    monkeypatch.setattr(data, "TOKENS_AT_ONCE", at_once)
    train(rollouts, **{**SETTINGS, "batch_size": 40})
    # The first and the last response, to tell rollouts apart.
    assert reads[0][0] == rollouts.lengths[[0, -1]].tolist()
    largest = max(sum(lengths) for lengths, _ in reads[1:])
    # A single response may be longer than what is read at once.
    assert largest <= at_once if at_once == 50 else all(len(lengths) == 1 for lengths, _ in reads[1:])
    # The states before are let go when the next ones have come.
    assert max(alive) <= 1 and largest < rollouts.num_tokens / 2
    # All were read, to check them and in each of three epochs.
    assert sum(sum(lengths) for lengths, _ in reads[1:]) == 4 * rollouts.num_tokens


@pytest.mark.parametrize("config", [TrainConfig("td"), TrainConfig("td-lambda", 0.5), TrainConfig("mc"), TrainConfig("released")], ids=lambda c: c.objective)
def test_the_gradient_of_a_mini_batch_does_not_depend_on_how_it_is_cut(tmp_path, monkeypatch, config):
    rollouts = made(tmp_path / "r", heads=2)
    torch.manual_seed(0)
    start = ValueFunction(WIDTH, (8,), 2).double()
    objective = config.new_objective()
    objective.bind(stored(rollouts, Processes(), dtype=torch.float64))
    standardisation = objective.standardisation
    assert torch.equal(standardisation.mean, rollouts.rewards.double().mean(0))
    batch = torch.randperm(40)
    states, lengths, rewards = rollouts.batch(batch)
    by_response = config.objective == "released"
    loss = released_loss if by_response else lambda *case: td_loss(*case, objective.td_lambda)
    loss(start(states), standardisation.apply(rewards), lengths).backward()
    # Sums of 160 float64 terms in another order: 160 roundings of 1.1e-16.
    close = {"rtol": 1e-12, "atol": 1e-13}
    count = len(lengths) if by_response else len(states)
    wanted = float(loss(standardisation.undo(start(states).detach()), rewards.double(), lengths)) * count
    for at_once, pieces in ((10_000, 1), (60, 3), (1, 40)):
        monkeypatch.setattr(data, "TOKENS_AT_ONCE", at_once)
        assert len(list(data.parts(batch, rollouts.lengths))) >= pieces
        value = copy.deepcopy(start)
        value.zero_grad()
        assert objective.backward(value, batch) == (pytest.approx(wanted, rel=1e-12), count)
        for parameter, before in zip(value.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, before.grad, **close)


def test_what_is_saved_is_what_is_returned(rollouts, tmp_path):
    value, history = train(rollouts, out=tmp_path / "v", **SETTINGS)
    loaded, states = ValueFunction.from_pretrained(tmp_path / "v"), rollouts.batch([0, 1])[0]
    assert same(loaded, value) and loaded.provenance == json.loads(json.dumps(value.provenance))
    assert torch.equal(loaded(states), value(states))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in value.parameters())
    written = json.loads((tmp_path / "v" / "history.json").read_text())
    assert (written["finished"], written["epochs"], written["best_epoch"]) == (True, history, value.provenance["best_epoch"]["epoch"])
    # Writing changes nothing.
    assert same(value, train(rollouts, **SETTINGS)[0])


def test_the_provenance_says_what_it_was_trained_on_and_how(tmp_path):
    data = made(tmp_path / "r", base_model={"hidden_size": WIDTH, "sha": "x"})
    _, history = train(data, out=tmp_path / "v", seed=2, td_lambda=0.25, **SETTINGS)
    found = ValueFunction.from_pretrained(tmp_path / "v").provenance
    assert found["base_model"] == {"hidden_size": WIDTH, "sha": "x"} and found["rollouts"]["num_prompts"] == 10
    training = {"hidden_dims": [8], "seed": 2, "learning_rate": 1e-2, "batch_size": 8, "epochs": 3, "patience": 10, "validation_fraction": 0.1}
    assert found["training"].items() >= {**training, "td_lambda": 0.25, "dtype": "float32"}.items()
    assert found["data"]["responses"] == 40 and found["data"]["held_out"] == 4 and found["best_epoch"] in history
    assert found["made_with"]["torch"] == torch.__version__


def test_no_rollouts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rollout folder: manifest\.json is missing"):
        train(tmp_path / "missing", **SETTINGS)
    RolloutWriter(tmp_path / "empty", {"num_shards": 1}).write(0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], [])
    with pytest.raises(ValueError, match="empty has no responses to train on"):
        train(tmp_path / "empty", **SETTINGS)
    made(tmp_path / "r")
    (tmp_path / "r" / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="is not complete: found 2 of 3 shards"):
        train(tmp_path / "r", **SETTINGS)
    # What is there can be had on request.
    assert train(Rollouts(tmp_path / "r", allow_partial=True), **SETTINGS)[0].provenance["data"]["responses"] == 24


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_and_named_before_training(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(Learner, "update", None)
    states = [torch.zeros(3, 4) for _ in range(12)]
    for index in (1, 7):
        states[index][2, 3] = bad
    Rollouts.write(tmp_path / "few", states, torch.randn(12), shard_size=5)
    with pytest.raises(ValueError, match=r"hidden states must be finite, found NaN or infinite ones in responses 1, 7 of .*few"):
        train(tmp_path / "few", **SETTINGS)
    Rollouts.write(tmp_path / "all", [torch.full((1, 4), bad)] * 12, torch.randn(12))
    with pytest.raises(ValueError, match="in responses 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"):
        train(tmp_path / "all", **SETTINGS)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_rewards_that_are_not_finite_are_refused_and_named(tmp_path, bad):
    data = made(tmp_path / "r", heads=2)
    data.rewards[3, 1] = data.rewards[20, 0] = bad
    with pytest.raises(ValueError, match=r"rewards must be finite, found others in responses 3, 20$"):
        train(data, **SETTINGS)


def test_one_prompt_cannot_be_split(tmp_path):
    data = Rollouts.write(tmp_path / "r", [torch.randn(2, 4) for _ in range(5)], torch.randn(5), groups=[3] * 5)
    with pytest.raises(ValueError, match="found 1 prompt, wanted at least 2 to hold one out; validation_fraction=0 trains without"):
        train(data, **SETTINGS)
    assert len(train(data, validation_fraction=0, **SETTINGS)[1]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"learning_rate": rate}, "learning_rate must be finite and above 0") for rate in (-1e-3, 0.0, float("nan"), float("inf"))),
        *(({name: 0}, f"{name} must be an integer of at least 1, found 0") for name in ("epochs", "batch_size", "patience", "checkpoint_every")),
        *(({name: 2.5}, f"{name} must be an integer of at least 1, found 2.5") for name in ("epochs", "batch_size", "patience", "checkpoint_every")),
        ({"epochs": None}, "epochs must be an integer of at least 1, found None"),
        *(({"td_lambda": number}, f"td_lambda must be between 0 and 1, found {number}") for number in (-0.1, 1.5, float("nan"))),
        *(({"validation_fraction": number}, "validation_fraction must be at least 0 and below 1") for number in (-0.1, 1.0, float("nan"))),
        ({"seed": -1}, "seed must be an integer of at least 0 and below"),
        ({"dtype": torch.bfloat16}, r"dtype must be float32 or float64, since smaller ones lose Adam's updates, found 'bfloat16'"),
        ({"hidden_dims": (8, 0)}, r"must be a sequence of positive integers such as \(4096,\), found \(8, 0\)"),
        ({"hidden_dims": 64}, r"hidden_dims must be a sequence of positive integers such as \(4096,\), found 64"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda'; choose one of 'auto', 'torch', 'closed-form', 'triton'"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_nothing_is_written(rollouts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(rollouts, **{**SETTINGS, "out": tmp_path / "v", **options})
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("epochs", [1, 5])
def test_training_that_diverges_says_so(rollouts, epochs):
    """Also when only the last update did it, which no training loss comes after."""
    with pytest.raises(FloatingPointError, match=r"training diverged in epoch \d; lower learning_rate, now 1e\+25"):
        train(rollouts, **{**SETTINGS, "learning_rate": 1e25, "batch_size": 40, "epochs": epochs})


def test_weights_that_are_not_finite_at_the_end_are_not_returned(rollouts, monkeypatch):
    def breaking(learner, *rest):
        with torch.no_grad():
            learner.value.layers[0].weight[0, 0] = float("nan")
        return 1.0, 1

    monkeypatch.setattr(Learner, "update", breaking)
    with pytest.raises(FloatingPointError, match="training diverged in epoch 0"):
        train(rollouts, **{**SETTINGS, "batch_size": 40, "epochs": 1, "validation_fraction": 0})
