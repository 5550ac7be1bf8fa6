"""Reward against divergence: which settings are worth their divergence, and how methods compare at the same one.

A point is anything with `.reward`, a mean, and `.kl`, KL(controlled || uncontrolled) in nats a response, for example a `Result`. Intervals also need
`.rewards` and `.kls`, one number a response, in the same order at all points, seed after seed, with `.seeds` (1 if missing). Lines are straight in
d = sqrt(KL): for a small edit the reward is linear in d, and reward models that are climbed too far follow R = d (a - b d) (Gao et al. 2023, section 3).
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class AtKL:
    """A method's reward at one level of divergence, by interpolation, and its interval, (low, high), by percentile bootstrap over prompts.

    The reward is None beyond the largest KL that was measured, the interval also where points have no numbers for each response.
    """

    kl: float
    reward: float | None
    interval: tuple[float, float] | None


def pareto(points: Sequence[Any]) -> list[Any]:
    """The points that no other beats, by growing KL: none has a larger reward at no larger KL, or a smaller KL at no smaller reward.

    Args:
        points: measured settings, of equal ones the first; ValueError for a reward that is not finite, or a KL that is not finite or is negative.
    """
    _check(points)
    kept: list[Any] = []
    for point in sorted(points, key=lambda each: (each.kl, -each.reward)):
        if not kept or point.reward > kept[-1].reward:
            kept.append(point)
    return kept


def choose_at_kl(points: Sequence[Any], max_kl: float) -> Any:
    """The largest reward within a divergence: argmax of reward over the points with KL <= max_kl; of equals the smallest KL, then the first.

    Args:
        points: measured settings, the uncontrolled model among them if it may be chosen; ValueError as for `pareto`.
        max_kl: the budget, in nats; ValueError where all points have a larger KL.
    """
    affordable = [point for point in pareto(points) if point.kl <= max_kl]
    if not affordable:
        smallest = f"the smallest KL of these {len(points)} points is {min(point.kl for point in points):.4g}" if points else "there are no points"
        raise ValueError(f"no point has a KL of {max_kl} or less: {smallest}")
    return affordable[-1]


def knee(points: Sequence[Any], uncontrolled: Any) -> Any:
    """The point of the frontier furthest above its chord: from there on, divergence pays less than on average.

    The frontier runs from (d_0 = 0, R_0), the uncontrolled model, to its last point (d_m, R_m), d = sqrt(KL); the point chosen is

        argmax_i  (R_i - R_0) / (R_m - R_0) - d_i / d_m,

    of equals that of the largest reward. On a parabola R = d (a - b d) that is three quarters of the largest gain for a quarter of its KL.

    Args:
        points: measured settings; ValueError as for `pareto`.
        uncontrolled: the uncontrolled model; its KL counts as 0. It is returned where no point has a larger reward.

    Source: Satopaa et al. 2011 (Kneedle), for the distance to the chord.
    """
    _check([uncontrolled])
    frontier = [point for point in pareto(points) if point.reward > uncontrolled.reward]
    if not frontier or frontier[-1].kl == 0:
        return frontier[-1] if frontier else uncontrolled
    last = frontier[-1]

    def height(point: Any) -> float:
        gain = (point.reward - uncontrolled.reward) / (last.reward - uncontrolled.reward)
        # Rounding must not decide between the points of a straight line.
        return round(gain - math.sqrt(point.kl / last.kl), 9)

    return max(frontier, key=lambda point: (height(point), point.reward))


def at_equal_kl(
    points: Mapping[str, Sequence[Any]], kl_levels: Sequence[float], uncontrolled: Any, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, list[AtKL]]:
    """The reward of each method at the same divergences, so that none wins by a larger one: by method, one entry for each level, in order.

    A method's line runs along its own frontier (`pareto`), which begins with the uncontrolled model at KL 0, straight in d = sqrt(KL) between neighbours,

        R(d) = R_i + (R_{i+1} - R_i) (d - d_i) / (d_{i+1} - d_i),  d_i <= d <= d_{i+1},

    and constant from its last point to the largest KL measured; beyond, the reward is None. For the intervals prompts are drawn with replacement, the same
    ones for all points of all methods, and means and lines are computed again. The seeds of a prompt are averaged first.

    Args:
        points: by method, its measured settings.
        kl_levels: divergences, in nats a response; ValueError for one that is negative or not finite.
        uncontrolled: the uncontrolled model; its KL counts as 0. ValueError for points with another number of responses.
        level: the share of resampled rewards inside an interval.
        resamples: how many times the prompts are drawn.
        seed: of the draws.
    """
    if any(not math.isfinite(kl) or kl < 0 for kl in kl_levels):
        raise ValueError(f"levels of KL must be finite and 0 or more, found {list(kl_levels)}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be inside (0, 1) and resamples at least 1, found {level} and {resamples}")
    for given in ([uncontrolled], *points.values()):
        _check(given)
    at = np.sqrt(np.asarray(kl_levels, dtype=np.float64))
    start, seeds = getattr(uncontrolled, "rewards", None), getattr(uncontrolled, "seeds", 1)
    prompts = 0 if start is None else len(start) // seeds
    draws = np.random.default_rng(seed).integers(0, max(prompts, 1), (resamples, prompts))
    table = {}
    for method, given in points.items():
        rewards = _line(np.array([[uncontrolled.reward, 0.0], *([point.reward, point.kl] for point in given)]), at)
        largest = max((point.kl for point in given), default=0.0)
        intervals: list[Any] = [None] * len(kl_levels)
        if prompts and (responses := _responses(method, start, given, seeds)) is not None:
            # A mean of estimated divergences may fall below 0 in a draw.
            lines = [_line(responses[:, :, draw].mean(-1).clip([-np.inf, 0.0]), at) for draw in draws]
            intervals = [(low, high) for low, high in np.quantile(lines, [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist()]
        measured = zip(kl_levels, rewards.tolist(), intervals, strict=True)
        table[method] = [AtKL(float(kl), *((None, None) if kl > largest else (reward, interval))) for kl, reward, interval in measured]
    return table


def _line(means: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The line through (points, [reward, KL]) at these d, constant behind its last point."""
    order = np.lexsort((-means[:, 0], means[:, 1]))
    rewards, kls = means[order].T
    # Where the running maximum does not rise, another point is better.
    best = np.maximum.accumulate(rewards)
    kept = np.concatenate([[True], best[1:] > best[:-1]])
    return np.interp(at, np.sqrt(kls[kept]), rewards[kept])


def _responses(method: str, start: Any, points: Sequence[Any], seeds: int) -> np.ndarray | None:
    """(points, [reward, KL], prompts), the uncontrolled model first; None where a point has no numbers for each response."""
    found = [start, np.zeros(len(start))]
    for point, name in [(point, name) for point in points for name in ("rewards", "kls")]:
        given = getattr(point, name, None)
        if given is None or not len(given):
            return None
        if len(given) != len(start):
            raise ValueError(f"a point of {method!r} has {len(given)} {name}, the uncontrolled model {len(start)} rewards: one a response is wanted")
        found.append(given)
    return np.array(found, dtype=np.float64).reshape(-1, 2, seeds, len(start) // seeds).mean(2)


def _check(points: Sequence[Any]) -> None:
    for place, point in enumerate(points):
        # The KL of a method that does not show its distributions is None.
        if not all(isinstance(given, numbers.Real) and math.isfinite(given) for given in (point.reward, point.kl)) or point.kl < 0:
            raise ValueError(f"points need a finite reward and a finite KL of 0 or more, found {point.reward} and {point.kl} at {place}")
