"""Training finds the known value function of a Markov reward process from sampled responses, and another one with a mistake of the released code."""

import numpy as np
import pytest
import torch

from recontrol.data.rollouts import Rollouts
from recontrol.training.objectives import tokens
from recontrol.training.objectives.tokens import bellman_targets
from recontrol.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

# A Markov reward process whose value function is known: six places in a row and three ends with a reward.
PLACES, REWARDS = 6, np.array([-2.0, 0.5, 4.0])
STATES = PLACES + len(REWARDS)
RESPONSES = 200
# Of Adam on mini-batches, which never comes to rest: measured at most 0.10 over five seeds of the data, lambda 0 and 1; the reward's
# standard deviation is 1.7.
OPTIMISATION = 0.15


def transitions():
    matrix = np.zeros((PLACES, STATES))
    for place in range(PLACES):
        matrix[place, place - 1 if place else PLACES] += 0.3
        matrix[place, place + 1 if place < PLACES - 1 else PLACES + 2] += 0.45
        matrix[place, PLACES + 1] += 0.25
    return matrix


def solved(matrix):
    """V = E[final reward | state]: the solution of V = P V in the places, with V known at the ends."""
    places = np.linalg.solve(np.eye(PLACES) - matrix[:, :PLACES], matrix[:, PLACES:] @ REWARDS)
    return np.concatenate([places, REWARDS])


class Chain:
    """Rollouts sampled from the process; the hidden state of a state is its unit vector."""

    def __init__(self, path):
        random = np.random.default_rng(0)
        walks = []
        for _ in range(RESPONSES):
            walks.append([int(random.integers(PLACES))])
            while walks[-1][-1] < PLACES:
                walks[-1].append(int(random.choice(STATES, p=transitions()[walks[-1][-1]])))
        rewards = np.array([REWARDS[walk[-1] - PLACES] for walk in walks])
        self.rollouts = Rollouts.write(path, [torch.eye(STATES)[walk] for walk in walks], rewards.tolist())
        self.exact = solved(transitions())
        visits = np.array([[walk.count(state) for state in range(STATES)] for walk in walks])
        counted = np.zeros((PLACES, STATES))
        for walk in walks:
            np.add.at(counted, (walk[:-1], walk[1:]), 1)
        # What the rollouts say: for lambda = 0 the V of the transitions as counted, for lambda = 1 the mean reward over visits.
        self.of_sample = {0.0: solved(counted / counted.sum(1, keepdims=True)), 1.0: rewards @ visits / visits.sum(0)}
        # Standard error of that mean, a response being one observation however often it visits a state; the V of the counted
        # transitions is the maximum-likelihood estimate, hence no further off. 5 of them: once in 10^6 states.
        deviations = visits * (rewards[:, None] - self.exact)
        self.sampling = 5 * np.sqrt((deviations**2).sum(0)) / visits.sum(0)

    def distances(self, td_lambda):
        """How far the trained V is from that of the process and that of the sample, in units of what is tolerated, in the worst state."""
        options = {"learning_rate": 3e-3, "batch_size": 50, "epochs": 80, "validation_fraction": 0, "progress": False, "device": "cpu"}
        value, _ = train(self.rollouts, (64,), td_lambda=td_lambda, **options)
        with torch.no_grad():
            found = value(torch.eye(STATES))[:, 0].numpy()
        from_process = np.abs(found - self.exact) / (self.sampling + OPTIMISATION)
        return from_process.max(), np.abs(found - self.of_sample[td_lambda]).max() / OPTIMISATION


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("chain") / "r")


@pytest.mark.parametrize("td_lambda", [0.0, 1.0])
def test_the_known_value_function_of_a_markov_reward_process_is_found(chain, td_lambda):
    from_process, from_sample = chain.distances(td_lambda)
    assert from_process <= 1 and from_sample <= 1


def reward_at_the_first_token(values, rewards, lengths, td_lambda=0.0):
    targets = bellman_targets(values, rewards, lengths, td_lambda)
    last = lengths.cumsum(0) - 1
    targets[last] = values.detach()[last]
    targets[last - lengths + 1] = rewards.to(values)
    return (values - targets).square().mean()


def no_stop_gradient(values, rewards, lengths, td_lambda=0.0):
    targets = values.roll(-1, dims=0).index_copy(0, lengths.cumsum(0) - 1, rewards.to(values))
    return (values - targets).square().mean()


@pytest.mark.parametrize("mistake", [reward_at_the_first_token, no_stop_gradient])
def test_with_a_mistake_of_the_released_code_another_value_function_is_found(chain, monkeypatch, mistake):
    monkeypatch.setattr(tokens, "td_loss", mistake)
    from_process, from_sample = chain.distances(0.0)
    assert from_process > 3 and from_sample > 3
