"""The report on a value function: its numbers by hand, and the command that shows it."""

import argparse
import json

import numpy as np
import pytest
import torch

from recontrol.cli import main
from recontrol.cli.train import add_options
from recontrol.data.rollouts import Rollouts
from recontrol.training.diagnosis import Diagnosis, diagnose, diagnose_values, save_diagnosis, table
from recontrol.training.objectives import OBJECTIVES
from recontrol.value import ValueFunction

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(weight, bias=0.0, **statistics):
    value = ValueFunction(len(weight), (), 1, **statistics)
    with torch.no_grad():
        value.layers[0].weight.copy_(torch.tensor([weight]))
        value.layers[0].bias.fill_(bias)
    return value


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The first number of a state comes nearer to the reward with each token, the second is noise."""
    random = np.random.default_rng(0)
    rewards = random.normal(size=60)
    states = []
    for number, reward in enumerate(rewards):
        length = 1 + number % 7
        known = np.sqrt((np.arange(length) + 1) / length)
        noise = random.normal(size=(2, length))
        states.append(torch.tensor(np.stack([known * reward + np.sqrt(1 - known**2) * noise[0], noise[1]], 1), dtype=torch.float32))
    return Rollouts.write(tmp_path_factory.mktemp("data") / "r", states, rewards.tolist(), groups=[number // 3 for number in range(60)])


def test_the_numbers_are_those_of_a_loop_over_tokens(rollouts):
    value, bins = linear([0.7, 0.2], 0.1), 4
    rows = []
    for number in range(60):
        states, _, reward = rollouts.batch([number])
        v = value(states).detach()[:, 0].double().numpy()
        rows += [(min(int((t + 0.5) / len(v) * bins), bins - 1), v[t], float(reward[0, 0]), v[0]) for t in range(len(v))]
    found = diagnose(value, rollouts, bins=bins)
    place, v, r, first = np.array(rows).T
    low, high = np.quantile(rollouts.rewards.double().numpy(), [1 / 3, 2 / 3])
    for number in range(bins):
        inside = place == number
        assert found.tokens[number] == inside.sum()
        assert found.correlation[number] == pytest.approx(np.corrcoef(v[inside], r[inside])[0, 1])
        assert found.explained_variance[number] == pytest.approx(1 - ((v - r)[inside] ** 2).mean() / r[inside].var())
        assert found.best_third[number] == pytest.approx(v[inside & (r >= high)].mean())
        assert found.worst_third[number] == pytest.approx(v[inside & (r <= low)].mean())
    assert found.movement == pytest.approx(np.sqrt(((v - first) ** 2).mean()) / rollouts.rewards.double().numpy().std())
    assert found.responses == 60 and sum(count for *_, count in found.calibration) == len(v)
    predicted = [mean for mean, *_ in found.calibration]
    assert predicted == sorted(predicted) and np.average(predicted, weights=[count for *_, count in found.calibration]) == pytest.approx(v.mean())


def test_a_v_that_follows_is_told_from_a_flat_one_and_a_calibrated_one_from_one_that_is_not(rollouts):
    follows, flat, loud = diagnose(linear([1.0, 0.0]), rollouts), diagnose(linear([0.0, 0.0], 0.3), rollouts), diagnose(linear([4.0, 0.0]), rollouts)
    assert follows.correlation[-1] > 0.95 > 0.8 > follows.correlation[0]
    assert flat.correlation == [None] * 10 and flat.movement == 0 and follows.movement > 0.2
    # Correlation does not see the scale, calibration and explained variance do.
    assert loud.correlation == pytest.approx(follows.correlation) and loud.explained_variance[-1] < 0 < follows.explained_variance[-1]
    assert abs(loud.calibration[-1][0] - loud.calibration[-1][1]) > 4 * abs(follows.calibration[-1][0] - follows.calibration[-1][1])


def test_a_standardised_v_is_taken_back_to_the_unit_of_the_reward(rollouts):
    plain, standardised = linear([1.0, 0.0], 0.5), linear([0.5, 0.0], 0.0, reward_mean=[0.5], reward_std=[2.0])
    found, wanted = diagnose(standardised, rollouts), diagnose(plain, rollouts)
    assert np.array(found.calibration) == pytest.approx(np.array(wanted.calibration)) and found.movement == pytest.approx(wanted.movement)


def test_only_the_responses_asked_for_are_taken(rollouts):
    chosen = torch.tensor([50, 3, 17, 8])
    found = diagnose(linear([1.0, 0.0]), rollouts, chosen, bins=2)
    assert found.responses == 4 and sum(found.tokens) == int(rollouts.lengths[chosen].sum())


def test_what_cannot_be_diagnosed_is_refused(rollouts):
    value = linear([1.0, 0.0])
    with pytest.raises(ValueError, match="found 2 responses with tokens to diagnose a value function on, wanted at least 3"):
        diagnose(value, rollouts, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="has states of 2 numbers and 1 rewards, the value function wants 3 and 1"):
        diagnose(linear([1.0, 0.0, 0.0]), rollouts)
    for options, message in (({"bins": 0}, "bins must be"), ({"head": 1}, "head must be one of 1, found head=1"), ({"bins": 2.5}, "bins must be")):
        with pytest.raises(ValueError, match=message):
            diagnose(value, rollouts, **options)


def test_numbers_that_are_not_defined_are_none(tmp_path):
    same = Rollouts.write(tmp_path / "r", [torch.randn(2, 2) for _ in range(5)], [1.5] * 5)
    found = diagnose(linear([1.0, 0.0]), same)
    assert found.movement is None and set(found.correlation) == set(found.explained_variance) == {None}
    # Of two tokens, the first is in the third tenth and the second in the eighth.
    assert found.tokens == [0, 0, 5, 0, 0, 0, 0, 5, 0, 0] and found.best_third[0] is None
    save_diagnosis(tmp_path / "out", {"same": found})
    assert "moves -" in table({"same": found})


def test_the_report_is_written_whole(rollouts, tmp_path):
    diagnoses = {"td": diagnose(linear([1.0, 0.0]), rollouts), "reference": diagnose(linear([0.0, 1.0]), rollouts)}
    save_diagnosis(tmp_path / "out", diagnoses)
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert Diagnosis(**{**content["value_functions"]["td"], "calibration": diagnoses["td"].calibration}) == diagnoses["td"]
    assert (tmp_path / "out" / "diagnosis.png").read_bytes().startswith(b"\x89PNG") and len(list((tmp_path / "out").iterdir())) == 2
    lines = table(diagnoses).splitlines()
    assert [line.split()[0] for line in lines] == ["correlation", "td", "reference", "explained", "td", "reference"]
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"found {number} value functions to draw, wanted 1 to 5"):
            save_diagnosis(tmp_path / "none", {str(name): diagnoses["td"] for name in range(number)})
    assert not (tmp_path / "none").exists()


def run(*arguments):
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    return raised.value.code


def test_the_command_shows_what_the_released_mistakes_cost(rollouts, tmp_path, capsys):
    common = ["train", "--rollouts", rollouts.path, "--hidden-dims", "16", "--device", "cpu", "--validation-fraction", 0.5, "--learning-rate", 0.03]
    common += ["--batch-size", 6]
    assert run(*common, "--objective", "released", "--epochs", 30, "--out", tmp_path / "reference") == 0
    assert "correlation" not in capsys.readouterr().out and not (tmp_path / "reference" / "diagnosis.json").exists()
    assert run(*common, "--td-lambda", 0.9, "--epochs", 30, "--out", tmp_path / "td", "--compare", tmp_path / "reference") == 0
    out = capsys.readouterr().out
    assert "prompts held out, 30 responses" in out and "correlation of V with the final reward" in out
    found = json.loads((tmp_path / "td" / "diagnosis.json").read_text())["value_functions"]
    assert list(found) == [str(tmp_path / "td"), str(tmp_path / "reference")]
    follows, flat = found.values()
    assert follows["correlation"][-1] > flat["correlation"][-1] and follows["movement"] > flat["movement"]
    # The same command again only makes the report again; without validation it is on what was trained on, and says so.
    assert run(*common, "--objective", "mc", "--epochs", 1, "--out", tmp_path / "all", "--validation-fraction", 0, "--report") == 0
    assert "the prompts trained on, for lack of others, 60 responses" in capsys.readouterr().out


def test_the_command_knows_all_objectives():
    parser = argparse.ArgumentParser()
    add_options(parser)
    shown = next(action.help for action in parser._actions if action.dest == "objective")
    assert [name for name in OBJECTIVES if f'"{name}"' not in shown] == []


def test_values_that_were_recorded_give_the_same_numbers(rollouts):
    value = linear([0.7, 0.2], 0.1)
    values = [value(rollouts.batch([number])[0]).detach()[:, 0].tolist() for number in range(60)]
    rewards = rollouts.rewards[:, 0].tolist()
    found, wanted = diagnose_values(values, rewards, bins=4), diagnose(value, rollouts, bins=4)
    assert found.tokens == wanted.tokens and found.correlation == pytest.approx(wanted.correlation) and found.movement == pytest.approx(wanted.movement)
    assert np.array(found.calibration) == pytest.approx(np.array(wanted.calibration))
    # A response without a token has no V, and its reward is not looked at.
    assert diagnose_values([[], *values], [100.0, *rewards], bins=4) == found


@pytest.mark.parametrize(
    ("values", "rewards", "bins", "message"),
    [
        ([[0.0]] * 3, [1.0], 4, "found 1 rewards for the values along 3 responses"),
        ([[0.0], [], [1.0]], [1.0, 2.0, 3.0], 4, "found 2 responses with tokens"),
        ([[0.0]] * 3, [1.0, 2.0, 3.0], 0, "bins=0"),
    ],
)
def test_values_that_cannot_be_compared(values, rewards, bins, message):
    with pytest.raises(ValueError, match=message):
        diagnose_values(values, rewards, bins=bins)
