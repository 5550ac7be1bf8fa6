"""Weighted sums of value functions: one ascent for several objectives."""

import copy

import pytest
import torch

import recontrol as rc

SIZE = 6

pytestmark = pytest.mark.usefixtures("one_thread")


def value(*hidden_dims, heads=1, seed=0, size=SIZE, **options):
    torch.manual_seed(seed)
    return rc.ValueFunction(size, hidden_dims, heads, **options).double()


DEPTHS = {"one layer": ((), ()), "two": ((16,), (9,)), "three": ((16, 5), (9, 8)), "four": ((4, 5, 6), (7, 8, 9))}


@pytest.fixture
def hidden():
    return torch.randn(5, SIZE, dtype=torch.float64)


@pytest.mark.parametrize("dims", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_weighted_sum(dims, heads, hidden):
    first, second = (value(*each, heads=heads, seed=seed) for seed, each in enumerate(dims))
    total = 0.7 * first + 0.3 * second
    torch.testing.assert_close(total(hidden), 0.7 * first(hidden) + 0.3 * second(hidden))
    assert total.dtype == torch.float64


@pytest.mark.parametrize("dims", DEPTHS.values(), ids=DEPTHS)
def test_climbing_it_is_climbing_the_sum_of_gradients(dims, hidden):
    first, second = (value(*each, seed=seed) for seed, each in enumerate(dims))
    at = hidden.clone()
    for _ in range(4):
        at = at.requires_grad_()
        (slope,) = torch.autograd.grad((2 * first(at) - 0.5 * second(at)).sum(), at)
        at = (at + 0.3 * slope).detach()
    torch.testing.assert_close(rc.ascend(hidden, 2 * first - 0.5 * second, 0.3, 4), at)


def test_arithmetic(hidden):
    first, second, third = value(8), value(5, seed=1), value(3, seed=2)
    sums = {
        "numbers on either side": (first * 2, 2 * first(hidden)),
        "no weights": (first + second, first(hidden) + second(hidden)),
        "minus": (first - second, first(hidden) - second(hidden)),
        "down": (-first, -first(hidden)),
        "multiplied out": (0.5 * (first + 2 * second) - 3 * (second + third), 0.5 * first(hidden) - 2 * second(hidden) - 3 * third(hidden)),
    }
    for name, (found, wanted) in sums.items():
        torch.testing.assert_close(found(hidden), wanted, msg=name)
    assert [weight for weight, _ in sums["multiplied out"][0].terms] == [0.5, 1.0, -3.0, -3.0]
    assert "weights=(0.5, 1.0, -3.0, -3.0)" in repr(sums["multiplied out"][0])


def test_it_is_saved_and_loaded_as_one_value_function(tmp_path, hidden):
    total = 0.7 * value(8, provenance={"data": "one"}) + 0.3 * value(5, seed=1, provenance={"data": "other"})
    total.save_pretrained(tmp_path)
    loaded = rc.ValueFunction.from_pretrained(tmp_path)
    assert torch.equal(loaded(hidden), total(hidden)) and loaded.hidden_dims == (13,)
    assert loaded.provenance["terms"] == [{"weight": 0.7, "data": "one"}, {"weight": 0.3, "data": "other"}]


def test_it_has_weights_of_its_own(hidden):
    part = value(8)
    total = 2 * part
    before = total(hidden)
    with torch.no_grad():
        part.layers[0].weight.zero_()
    assert torch.equal(total(hidden), before) and torch.equal(copy.deepcopy(total)(hidden), before)


def test_making_one_draws_no_random_numbers():
    first, second = value(8), value(5)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    assert (first + second).device.type == "cpu" and torch.equal(torch.rand(1), wanted)


REFUSED = {
    "other depth": (lambda one: one + value(3, 4), ValueError, "same number of layers, found 2, 3"),
    "other size": (lambda one: one + value(3, size=7), ValueError, "same hidden size, found 6, 7"),
    "other heads": (lambda one: one + value(3, heads=2), ValueError, "same number of heads, found 1, 2"),
    "other dtype": (lambda one: one + value(3).float(), ValueError, "same dtype"),
    "no number": (lambda one: one * "2", TypeError, "a weight must be a number, found '2'"),
    "not finite": (lambda one: float("nan") * one, ValueError, "weights must be finite, found nan"),
    "no value function": (lambda one: one + 1, TypeError, "a term must be a recontrol.ValueFunction, found int"),
    "nothing": (lambda one: rc.WeightedSum([]), ValueError, "at least one term"),
}


@pytest.mark.parametrize("make, error, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(value(8))
