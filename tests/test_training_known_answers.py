"""Every objective on data whose answer is known in closed form: tabular states, double precision, no sampling error."""

import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
import torch

from recontrol.data.rollouts import Rollouts
from recontrol.data.shards import RolloutWriter
from recontrol.training.diagnosis import diagnose
from recontrol.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

# One mini-batch an epoch, hence gradient descent without noise, which comes to rest as the learning rate goes to 0.
EXACT = {"dtype": torch.float64, "batch_size": 10_000, "validation_fraction": 0, "schedule": "cosine", "progress": False, "device": "cpu"}
STEPS, STARTS = 2, 2


class Walks:
    """A Markov reward process in which every path is taken equally often, so that the sample is the process.

    From one of two starts a walker goes up or down twice; a state is (start, steps done, steps up), and the reward at the end
    depends on the start and the steps up. Hidden states are unit vectors, V is linear in them: any table of values.
    """

    def __init__(self, path):
        self.states = [(start, t, ups) for start in range(STARTS) for t in range(STEPS + 1) for ups in range(t + 1)]
        self.reward = np.array([[-2.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
        number = {state: place for place, state in enumerate(self.states)}
        self.walks = []
        for start, moves in itertools.product(range(STARTS), itertools.product((0, 1), repeat=STEPS)):
            self.walks.append([number[start, t, sum(moves[:t])] for t in range(STEPS + 1)])
        self.rewards = np.array([self.reward[self.states[walk[-1]][0], self.states[walk[-1]][2]] for walk in self.walks])
        self.rollouts = Rollouts.write(path, [torch.eye(len(self.states))[walk] for walk in self.walks], self.rewards.tolist())

    def exact(self):
        """V = E[reward | state], by backward induction: half of each successor's."""
        value = {}
        for start, t, ups in reversed(self.states):
            ahead = [value.get((start, t + 1, ups + up)) for up in (0, 1)]
            value[start, t, ups] = self.reward[start, ups] if t == STEPS else sum(ahead) / 2
        return np.array([value[state] for state in self.states])

    def of_start(self):
        """E[reward | start] in every state."""
        return np.array([self.rewards.reshape(STARTS, -1).mean(1)[start] for start, _, _ in self.states])

    def trained(self, **options):
        # TD hands values on from state to state, and needs longer.
        steps = {"learning_rate": 0.03, "epochs": 500} if options["objective"] == "td" else {"learning_rate": 0.05, "epochs": 250}
        value, _ = train(self.rollouts, (), **EXACT, **steps, **options)
        with torch.no_grad():
            return value, value(torch.eye(len(self.states)))[:, 0].numpy()


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    walks = Walks(tmp_path_factory.mktemp("walks") / "r")
    # Each run is made once for all tests.
    walks.trained = cache(walks.trained)
    return walks


# The rewards are stored in float32, 6e-8 of a number of the size of 5; what is left of the optimisation was measured at most 7e-4 (td).
CLOSE = {"atol": 2e-3, "rtol": 0}


@pytest.mark.parametrize("options", [{"objective": "td"}, {"objective": "td-lambda", "td_lambda": 0.7}, {"objective": "mc"}], ids=["td", "td-lambda", "mc"])
def test_the_exact_value_function_is_found(walks, options):
    _, found = walks.trained(**options)
    np.testing.assert_allclose(found, walks.exact(), **CLOSE)
    assert np.abs(walks.exact() - walks.of_start()).max() > 0.5


def test_the_released_loss_says_along_the_whole_response_what_it_said_after_the_prompt(walks):
    value, found = walks.trained(objective="released")
    np.testing.assert_allclose(found, walks.of_start(), **CLOSE)
    assert diagnose(value, walks.rollouts).movement < 1e-4


def test_the_report_tells_a_value_function_that_follows_the_response_from_one_that_does_not(walks):
    right, _ = walks.trained(objective="td")
    wrong, _ = walks.trained(objective="released")
    followed, ignored = (diagnose(value, walks.rollouts, bins=STEPS + 1) for value in (right, wrong))
    # The correlation of E[r | s] with r is the ratio of their standard deviations; every state of a step is one bin here.
    visits = np.array(walks.walks)
    wanted = walks.exact()[visits].std(0) / walks.rewards.std()
    np.testing.assert_allclose(followed.correlation, wanted, **CLOSE)
    np.testing.assert_allclose(followed.explained_variance, wanted**2, **CLOSE)
    moves = walks.exact()[visits] - walks.exact()[visits[:, :1]]
    assert followed.movement == pytest.approx(np.sqrt((moves**2).mean()) / walks.rewards.std(), abs=2e-3) and followed.movement > 0.2
    # What is known after the prompt is all that the other ever says.
    np.testing.assert_allclose(ignored.correlation, wanted[0], **CLOSE)
    assert wanted[0] < 0.5 and followed.correlation[-1] > 0.999
    assert followed.best_third[-1] - followed.worst_third[-1] > 1.2 * (ignored.best_third[-1] - ignored.worst_third[-1])


def test_the_average_of_the_weights_comes_to_the_same_rest(walks):
    _, found = walks.trained(objective="mc", ema_decay=0.9)
    np.testing.assert_allclose(found, walks.exact(), **CLOSE)


def test_weight_decay_draws_values_to_the_mean_reward(walks):
    """V = mean + w_s in standard deviations, and AdamW draws w_s to 0."""
    _, free = walks.trained(objective="mc")
    _, decayed = walks.trained(objective="mc", weight_decay=0.3)
    mean = walks.rewards.mean()
    assert np.abs(decayed - mean).mean() < 0.98 * np.abs(free - mean).mean()


def test_standardised_values_are_those_of_the_reward_taken_back(walks):
    value, found = walks.trained(objective="mc", normalise_rewards=True)
    mean, std = walks.rewards.mean(), walks.rewards.std()
    assert value.reward_mean == (pytest.approx(mean),) and value.reward_std == (pytest.approx(std),)
    np.testing.assert_allclose(found, (walks.exact() - mean) / std, **CLOSE)
    np.testing.assert_allclose(value.to_reward(torch.from_numpy(found)[:, None])[:, 0].numpy(), walks.exact(), **CLOSE)
    plain, _ = walks.trained(objective="mc")
    assert plain.reward_mean is None and plain.reward_std is None


# Preferences between three last states: how often the row was preferred to the column. Bradley and Terry's model fits them
# exactly where log(wins / losses) are differences of scores: log 2, log 3 and log 6.
WINS = {(0, 1): (2, 1), (1, 2): (3, 1), (0, 2): (6, 1)}
LAST = 3


def compared(path, by):
    """A pair of responses for each comparison; the first state of all is the same, the last one is what was compared."""
    states, labels, rewards = [], [], []
    for (first, second), (wins, losses) in WINS.items():
        for better, worse in [(first, second)] * wins + [(second, first)] * losses:
            states += [torch.eye(LAST + 1)[[LAST, better]], torch.eye(LAST + 1)[[LAST, worse]]]
            labels += ["chosen", "rejected"]
            rewards += [1.0, 0.0]
    groups = [place // 2 for place in range(len(states))]
    if by == "reward":
        return Rollouts.write(path, states, rewards, groups=groups)
    # Rewards that say the opposite, which labels overrule.
    records = [
        {"index": group, "prompt": "", "response": f"{place}", "reward": [1 - reward], "finish": "eos", "pair": group, "preference": label}
        for place, (group, label, reward) in enumerate(zip(groups, labels, rewards, strict=True))
    ]
    writer = RolloutWriter(path, {"base_model": None, "num_prompts": len(set(groups)), "num_shards": 1})
    writer.write(0, torch.cat(states), torch.full((2 * len(states),), -1), [2] * len(states), records)
    return Rollouts(path)


def scores(rollouts, **options):
    value, history = train(rollouts, (), objective="preference", **EXACT, **{"learning_rate": 0.05, "epochs": 200, **options})
    with torch.no_grad():
        found = value(torch.eye(LAST + 1))[:, 0].numpy()
    return found[:LAST], found[LAST], history


@pytest.mark.parametrize("by", ["reward", "label"])
def test_preferences_give_the_scores_of_bradley_and_terry(tmp_path, by):
    found, _, history = scores(compared(tmp_path / "r", by))
    np.testing.assert_allclose(found[:2] - found[1:], np.log([2, 3]), **CLOSE)
    pairs = [(wins / (wins + losses), wins + losses) for wins, losses in WINS.values()]
    entropy = -sum(count * (p * math.log(p) + (1 - p) * math.log(1 - p)) for p, count in pairs) / sum(count for _, count in pairs)
    assert history[0]["train_preference_loss"] == pytest.approx(math.log(2)) and history[-1]["train_preference_loss"] == pytest.approx(entropy, abs=1e-6)


def test_the_regulariser_holds_the_margin_down(tmp_path):
    """Two states compared, one always better: without it the margin has no bound; with it the derivative by the margin d is 0."""
    rollouts = Rollouts.write(tmp_path / "r", [torch.eye(2)[[place % 2]] for place in range(8)], [1.0, 0.0] * 4, groups=[place // 2 for place in range(8)])
    options = {**EXACT, "learning_rate": 0.1, "epochs": 150, "objective": "preference"}
    margins = []
    for weight in (0.0, 0.25, 1.0):
        value, _ = train(rollouts, (), preference_regulariser=weight, **options)
        with torch.no_grad():
            first, second = value(torch.eye(2))[:, 0].tolist()
        margins.append(first - second)
        if weight:
            assert 2 * weight * margins[-1] == pytest.approx(1 / (1 + math.exp(margins[-1])), abs=1e-4)
    assert margins[0] > 4 > 1 > margins[1] > margins[2] > 0


def test_regression_beside_preferences_predicts_the_reward(tmp_path):
    """Pref-CTRL's three terms at once: the generated response's value is its reward where nothing else is asked of it."""
    records = []
    # For each prompt, chosen and rejected texts, and a response of the model: states 0, 1 and 2, or 3, which no pair has.
    for group, (state, reward) in enumerate([(2, 5.0), (2, 7.0), (3, 1.0)]):
        for place, (at, label, of) in enumerate([(0, "chosen", 100.0), (1, "rejected", -100.0), (state, None, reward)]):
            extra = {} if label is None else {"pair": group, "preference": label}
            records.append((at, {"index": group, "prompt": "", "response": f"{group} {place}", "reward": [of], "finish": "eos", **extra}))
    writer = RolloutWriter(tmp_path / "r", {"base_model": None, "num_prompts": 3, "num_shards": 1})
    writer.write(0, torch.eye(4)[[at for at, _ in records]], torch.full((9,), -1), [1] * 9, [record for _, record in records])
    options = {**EXACT, "learning_rate": 0.1, "epochs": 300, "objective": "preference", "preference_regression": 1.0}
    value, history = train(tmp_path / "r", (), **options)
    with torch.no_grad():
        v = value(torch.eye(4))[:, 0].numpy()
    # Rewards of the texts play no part: regression is on the model's own responses.
    np.testing.assert_allclose(v[2:], [6, 1], **CLOSE)
    assert v[0] > v[1] + 3
    together, _ = train(tmp_path / "r", (), preference_regulariser=1.0, **options)
    with torch.no_grad():
        v = together(torch.eye(4))[:, 0].numpy()
    # Where the derivatives by the four values are 0: 1 pair in each prompt, anchors (2, 0), (2, 0) and (3, 0).
    margin = -1 / (1 + math.exp(v[0] - v[1]))
    gaps = np.array([v[2] - v[0], v[2] - v[0], v[3] - v[0]])
    assert margin - 2 * gaps.mean() == pytest.approx(0, abs=1e-3)
    assert 2 / 3 * ((v[2] - 5) + (v[2] - 7) + gaps[0] + gaps[1]) == pytest.approx(0, abs=1e-3)
    assert 2 / 3 * ((v[3] - 1) + gaps[2]) == pytest.approx(0, abs=1e-3)
    assert json.dumps(together.provenance["objective"]).count("squared gap") == 1 and history
