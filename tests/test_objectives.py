import numpy as np
import pytest
import torch

from recontrol.training.objectives.tokens import bellman_targets, held_out_scores, td_loss

LENGTHS = [3, 1, 7, 2, 1, 5]
# Sums of some tens of float64 terms of the size of 1, in two orders, differ by a few units of 2.2e-16 each.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def case(lengths=LENGTHS, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sum(lengths), heads, generator=generator, dtype=dtype)
    return values, torch.randn(len(lengths), heads, generator=generator, dtype=dtype), torch.tensor(lengths)


def targets_by_loop(values, rewards, lengths, td_lambda):
    targets = torch.empty_like(values)
    start = 0
    for length, reward in zip(lengths.tolist(), rewards, strict=True):
        target = reward
        for t in reversed(range(start, start + length)):
            if t < start + length - 1:
                target = (1 - td_lambda) * values[t + 1] + td_lambda * target
            targets[t] = target
        start += length
    return targets


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1, 1], [9], [2, 1]], ids=str)
def test_targets_are_those_of_a_loop_over_responses(lengths, heads, td_lambda):
    values, rewards, counts = case(lengths, heads)
    found = bellman_targets(values, rewards, counts, td_lambda)
    assert found.shape == values.shape and found.dtype == values.dtype
    torch.testing.assert_close(found, targets_by_loop(values, rewards, counts, td_lambda), **ROUNDING)


def test_the_reward_is_at_the_last_token_and_the_value_of_the_next_state_before_it():
    values, rewards, lengths = case([4, 1, 3], heads=1)
    targets = bellman_targets(values, rewards, lengths)
    # Nothing is computed, only moved: equal to the bit.
    assert torch.equal(targets, torch.cat([values[1:4], rewards[:1], rewards[1:2], values[6:8], rewards[2:]]))
    other = bellman_targets(values, rewards + 1, lengths)
    assert (other != targets)[:, 0].nonzero()[:, 0].tolist() == [3, 4, 7]
    # By default lambda is 0, and that is not what other lambdas give.
    assert torch.equal(targets, bellman_targets(values, rewards, lengths, 0.0))
    assert not torch.equal(targets, bellman_targets(values, rewards, lengths, 0.5))


def test_with_lambda_one_every_target_is_the_final_reward():
    values, rewards, lengths = case(heads=3)
    assert torch.equal(bellman_targets(values, rewards, lengths, 1.0), rewards.repeat_interleave(lengths, dim=0))


def test_a_response_does_not_depend_on_its_neighbours():
    values, rewards, lengths = case()
    together = bellman_targets(values, rewards, lengths, 0.3).split(LENGTHS)
    for own, reward, targets in zip(values.split(LENGTHS), rewards, together, strict=True):
        assert torch.equal(targets, bellman_targets(own, reward[None], torch.tensor([len(own)]), 0.3))


def test_the_arguments_are_left_as_they_were():
    values, rewards, lengths = case()
    before = values.clone(), rewards.clone(), lengths.clone()
    bellman_targets(values, rewards, lengths, 0.7)
    assert all(torch.equal(found, wanted) for found, wanted in zip((values, rewards, lengths), before, strict=True))


def test_targets_have_the_dtype_of_the_values():
    values, rewards, lengths = case()
    found = bellman_targets(values.float(), rewards, lengths, 0.5)
    assert found.dtype == torch.float32
    # Seven steps of float32, 6e-8 each, on numbers of the size of 1.
    torch.testing.assert_close(found.double(), targets_by_loop(values, rewards, lengths, 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_the_loss_is_the_mean_square_and_its_gradient_that_of_a_regression_on_constants(td_lambda):
    values, rewards, lengths = case()
    values.requires_grad_()
    assert not bellman_targets(values, rewards, lengths, td_lambda).requires_grad
    loss = td_loss(values, rewards, lengths, td_lambda)
    (gradient,) = torch.autograd.grad(loss, values)
    constants = targets_by_loop(values.detach(), rewards, lengths, td_lambda)
    torch.testing.assert_close(loss, (values - constants).square().mean(), **ROUNDING)
    torch.testing.assert_close(gradient, 2 * (values.detach() - constants) / values.numel(), **ROUNDING)
    # With the gradient through the targets it would be another, except where the targets hold no value.
    (through,) = torch.autograd.grad((values - targets_by_loop(values, rewards, lengths, td_lambda)).square().mean(), values)
    assert torch.allclose(through, gradient) == (td_lambda == 1)


@pytest.mark.parametrize("td_lambda", [0.0, 0.6])
def test_the_gradient_of_parameters_is_that_of_an_explicit_formula(td_lambda):
    """V = h w: the semi-gradient is 2 / (tokens heads) sum_t (V_t - target_t) h_t."""
    _, rewards, lengths = case(heads=2)
    states = torch.randn(sum(LENGTHS), 4, dtype=torch.float64)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    td_loss(states @ weight, rewards, lengths, td_lambda).backward()
    error = (states @ weight).detach() - targets_by_loop((states @ weight).detach(), rewards, lengths, td_lambda)
    torch.testing.assert_close(weight.grad, 2 * states.T @ error / error.numel(), **ROUNDING)


@pytest.mark.parametrize(
    ("values", "rewards", "lengths", "found"),
    [
        ((5,), (2, 1), [2, 3], r"values \(5,\)"),
        ((5, 1), (2,), [2, 3], r"rewards \(2,\)"),
        ((5, 2), (2, 1), [2, 3], r"values \(5, 2\), rewards \(2, 1\)"),
        ((5, 1), (3, 1), [2, 3], r"rewards \(3, 1\)"),
        ((5, 1), (2, 1), [2, 2], "lengths from 2 adding up to 4"),
        ((5, 1), (2, 1), [0, 5], "lengths from 0 adding up to 5"),
        ((5, 1), (2, 1), [-1, 6], "lengths from -1 adding up to 5"),
        ((5, 1), (0, 1), [], "lengths from 0 adding up to 0"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(values, rewards, lengths, found):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    for function in (bellman_targets, td_loss):
        with pytest.raises(ValueError, match=found) as raised:
            function(torch.zeros(values), torch.zeros(rewards), lengths)
        assert "wanted (tokens, heads), (responses, heads) and one length of at least 1 a response" in str(raised.value)


def by_hand(values, rewards, lengths, flat, td_lambda):
    v, r = values.numpy(), np.repeat(rewards.numpy(), lengths.numpy(), axis=0)
    error = ((v - r) ** 2).mean(0)
    return {
        "validation_td_loss": np.mean((v - targets_by_loop(values, rewards, lengths, td_lambda).numpy()) ** 2),
        "validation_mc_error": error.mean(),
        "validation_explained_variance": np.mean(1 - error / ((r - flat.numpy()) ** 2).mean(0)),
        "validation_correlation": np.mean([np.corrcoef(v[:, head], r[:, head])[0, 1] for head in range(v.shape[1])]),
    }


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("td_lambda", [0.0, 0.4])
def test_the_held_out_error_is_that_of_a_direct_computation(heads, td_lambda):
    values, rewards, lengths = case(heads=heads)
    # Far from 0, where sums of squares lose digits: (1000 / 1)^2 times 2e-16 of the variance, were they not taken from `flat`.
    values, rewards, flat = values + 1000, rewards + 1000, torch.full((heads,), 1000.25)
    found, wanted = held_out_scores(values, rewards, lengths, flat, td_lambda), by_hand(values, rewards, lengths, flat, td_lambda)
    assert found.keys() == wanted.keys()
    # Rounding of numbers of the size of 1000, 1e-13, in values that differ by about 1.
    assert found == pytest.approx(wanted, rel=1e-10)


def test_the_held_out_error_takes_values_that_require_grad_and_any_dtype():
    values, rewards, lengths = case(dtype=torch.float32)
    wanted = by_hand(values.double(), rewards.double(), lengths, torch.zeros(2), 0.0)
    # The TD loss is computed in the dtype of the values.
    assert held_out_scores(values.requires_grad_(), rewards, lengths, torch.zeros(2)) == pytest.approx(wanted, rel=1e-6)


def test_a_perfect_and_a_flat_value_function_score_one_and_zero():
    _, rewards, lengths = case(heads=1)
    flat = rewards.mean(0)
    for values, explained, correlation in ((rewards.repeat_interleave(lengths, dim=0), 1.0, 1.0), (flat.expand(sum(LENGTHS), 1), 0.0, None)):
        scores = held_out_scores(values, rewards, lengths, flat)
        assert scores["validation_explained_variance"] == pytest.approx(explained, abs=1e-12)
        assert scores["validation_correlation"] == (None if correlation is None else pytest.approx(correlation))


@pytest.mark.parametrize("constant", [0.1, 0.3, -1.7, 2.3])
def test_scores_that_are_not_defined_are_none(constant):
    """Also where the rounding of a constant's sums looks like a variance."""
    for count in range(2, 30):
        lengths, same, other = torch.full((count,), 2), torch.full((2 * count, 1), constant), torch.randn(2 * count, 1)
        same_values = held_out_scores(same, other[:count], lengths, torch.tensor([0.2]))
        same_rewards = held_out_scores(other, same[:count], lengths, torch.tensor([constant]))
        assert same_values["validation_correlation"] is None and same_values["validation_explained_variance"] is not None
        assert same_rewards["validation_correlation"] is None and same_rewards["validation_explained_variance"] is None
        assert same_rewards["validation_mc_error"] > 0
