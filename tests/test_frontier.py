"""Reward against divergence: frontiers, choices along them, and comparisons at equal KL."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recontrol.evaluation.frontier import at_equal_kl, choose_at_kl, knee, pareto
from recontrol.evaluation.metrics import bootstrap_interval


@dataclass(frozen=True)
class Measured:
    reward: float
    kl: float
    label: str = ""
    rewards: tuple[float, ...] | None = None
    kls: tuple[float, ...] | None = None
    seeds: int = 1


BASE = Measured(0.0, 0.0, "uncontrolled")
few = st.integers(0, 4).map(float)


def parabola(a=4.0, b=1.0, points=41):
    """R = d (a - b d), measured beyond its top."""
    top = a / (2 * b)
    return [Measured(d * (a - b * d), d * d) for d in np.linspace(0, 2 * top, points)]


@given(st.lists(st.builds(Measured, few, few), max_size=8))
def test_what_no_other_beats_is_on_the_frontier(points):
    def beaten(point):
        return any(o.reward >= point.reward and o.kl <= point.kl and (o.reward > point.reward or o.kl < point.kl) for o in points)

    found = pareto(points)
    assert sorted((p.kl, p.reward) for p in found) == sorted({(p.kl, p.reward) for p in points if not beaten(p)})
    assert [p.kl for p in found] == sorted(p.kl for p in found) and [p.reward for p in found] == sorted(p.reward for p in found)


def test_of_equal_points_the_first_is_on_the_frontier():
    assert pareto([Measured(1, 1, "first"), Measured(1, 1, "second")])[0].label == "first"


def test_the_largest_reward_within_a_budget():
    points = [Measured(2, 3), Measured(1, 1), Measured(1.5, 4), BASE]
    assert [choose_at_kl(points, budget).kl for budget in (0.5, 1, 2.9, 3, 100)] == [0, 1, 1, 3, 3]
    with pytest.raises(ValueError, match=r"KL of 0.5 or less: the smallest KL of these 2 points is 1$"):
        choose_at_kl(points[:2], 0.5)
    with pytest.raises(ValueError, match="there are no points"):
        choose_at_kl([], 1)


def test_the_knee_of_a_parabola_is_at_half_of_the_way_to_its_top():
    found = knee(parabola(), BASE)
    assert math.sqrt(found.kl) == pytest.approx(1) and found.reward == pytest.approx(3)


def test_the_knee_does_not_depend_on_the_units():
    points = parabola()
    scaled = [Measured(5 + 10 * p.reward, 7 * p.kl) for p in points]
    assert points.index(knee(points, BASE)) == scaled.index(knee(scaled, Measured(5, 0)))


def test_a_straight_line_has_no_knee_and_its_end_is_chosen():
    assert knee([Measured(0.1 * d, d * d) for d in range(1, 8)], BASE).kl == 49


def test_the_uncontrolled_model_stays_where_nothing_is_better():
    assert knee([Measured(-1, 2), Measured(0, 1)], BASE) is BASE
    assert knee([], BASE) is BASE
    assert knee([Measured(1, 0, "free")], BASE).label == "free"


def test_lines_are_straight_in_the_square_root_of_kl():
    table = at_equal_kl({"one": [Measured(4, 16), Measured(1, 4)], "other": [Measured(3, 9)]}, [0, 1, 4, 9, 16, 17], BASE)
    # d = 0, 1, 2, 3, 4
    assert [entry.reward for entry in table["one"]] == [0, 0.5, 1, 2.5, 4, None]
    assert [entry.reward for entry in table["other"]] == [0, 1, 2, 3, None, None]
    assert [entry.kl for entry in table["one"]] == [0, 1, 4, 9, 16, 17]
    assert all(entry.interval is None for entries in table.values() for entry in entries)


def test_points_that_others_beat_bend_no_line_but_say_how_far_was_measured():
    line = [Measured(2, 4), Measured(1.5, 3.9), Measured(-5, 1), Measured(1, 9)]
    table = at_equal_kl({"method": line}, [1, 4, 6, 9, 9.1], BASE)
    assert [entry.reward for entry in table["method"]] == pytest.approx([1 * 1.5 / math.sqrt(3.9), 2, 2, 2, None])


def test_a_method_that_only_loses_offers_the_uncontrolled_model():
    table = at_equal_kl({"worse": [Measured(1, 4)], "nothing": []}, [0, 1, 5], Measured(2, 0))
    assert [entry.reward for entry in table["worse"]] == [2, 2, None]
    assert [entry.reward for entry in table["nothing"]] == [2, None, None]


def responses(mean, kl, count=200, seed=0, spread=1.0):
    rewards = mean + spread * np.random.default_rng(seed).standard_normal(count)
    return Measured(float(rewards.mean()), kl, rewards=tuple(rewards), kls=(kl,) * count)


def test_at_a_measured_point_the_interval_is_that_of_its_mean():
    base, point = responses(0.0, 0.0, seed=1), responses(2.0, 4.0, seed=2)
    start, entry = at_equal_kl({"method": [point]}, [0, 4], base, resamples=4000)["method"]
    assert entry.reward == pytest.approx(point.reward) and start.reward == pytest.approx(base.reward)
    # Two bootstraps of 4000 draws: the standard error of a bound is 0.03 standard deviations of the mean.
    assert entry.interval == pytest.approx(bootstrap_interval(point.rewards), abs=0.2 / math.sqrt(200))
    assert start.interval == pytest.approx(bootstrap_interval(base.rewards), abs=0.2 / math.sqrt(200))


def test_the_spread_of_kl_counts_too():
    base = Measured(0.0, 0.0, rewards=(0.0,) * 100)
    kls = tuple(np.random.default_rng(0).uniform(0, 8, 100))
    point = Measured(2.0, float(np.mean(kls)), rewards=(2.0,) * 100, kls=kls)
    (entry,) = at_equal_kl({"method": [point]}, [2.0], base)["method"]
    low, high = entry.interval
    assert low < entry.reward < high
    assert low == pytest.approx(2 * math.sqrt(2 / bootstrap_interval(kls)[1]), rel=0.05)


def test_all_methods_get_the_same_draws():
    base, points = responses(0.0, 0.0, seed=1), [responses(1.0, 1.0, seed=2), responses(2.0, 4.0, seed=3)]
    table = at_equal_kl({"one": points, "same": points[::-1]}, [1, 2, 3], base, seed=4)
    assert table["one"] == table["same"]
    assert table["one"] != at_equal_kl({"one": points}, [1, 2, 3], base, seed=5)["one"]
    wide, narrow = (at_equal_kl({"one": points}, [2], base, level=level)["one"][0].interval for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_seeds_of_a_prompt_are_averaged_first():
    """Their responses are not independent: three times the same ones say no more about other prompts than once."""
    once = [responses(0.0, 0.0, seed=1), responses(2.0, 4.0, seed=2)]
    thrice = [Measured(each.reward, each.kl, rewards=each.rewards * 3, kls=each.kls * 3, seeds=3) for each in once]
    wanted = at_equal_kl({"method": once[1:]}, [1, 4], once[0])["method"]
    for found, entry in zip(at_equal_kl({"method": thrice[1:]}, [1, 4], thrice[0])["method"], wanted, strict=True):
        assert found.interval == pytest.approx(entry.interval)
    apart = at_equal_kl({"method": thrice[1:]}, [1, 4], Measured(once[0].reward, 0.0, rewards=once[0].rewards * 3))["method"]
    assert apart[1].interval[0] > wanted[1].interval[0]
    arrays = [Measured(each.reward, np.float32(each.kl), rewards=np.array(each.rewards), kls=np.array(each.kls)) for each in once]
    assert at_equal_kl({"method": arrays[1:]}, [1, 4], arrays[0])["method"] == wanted


def test_what_cannot_be_compared_is_named():
    base = responses(0.0, 0.0, seed=1)
    with pytest.raises(ValueError, match="a point of 'short' has 9 rewards, the uncontrolled model 200 rewards"):
        at_equal_kl({"short": [responses(1.0, 1.0, count=9)]}, [1], base)
    assert at_equal_kl({"plain": [Measured(1, 1)]}, [1], base)["plain"][0].interval is None
    assert at_equal_kl({"empty": [Measured(1, 1, kls=(), rewards=base.rewards)]}, [1], base)["empty"][0].interval is None
    for wrong in (Measured(float("nan"), 1), Measured(1, None), Measured(1, -0.1), Measured(1, float("inf"))):
        for call, arguments in ((pareto, ([BASE, wrong],)), (knee, ([wrong], BASE)), (at_equal_kl, ({"m": [wrong]}, [1], BASE))):
            with pytest.raises(ValueError, match="points need a finite reward and a finite KL of 0 or more"):
                call(*arguments)
    with pytest.raises(ValueError, match="levels of KL must be finite and 0 or more, found \\[-1\\]"):
        at_equal_kl({}, [-1], BASE)
    with pytest.raises(ValueError, match="resamples at least 1"):
        at_equal_kl({}, [1], BASE, resamples=0)
