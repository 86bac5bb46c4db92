from __future__ import annotations

import numpy as np
import pytest

from experiments.coverage import WORLDS, World, coverage
from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval


def test_wilson_against_the_published_form() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(60, 30, 166), (0, 0, 256), (10, 0, 246)])
def test_wilson_with_ties_solves_its_equation(wins: int, losses: int, ties: int) -> None:
    """At both ends (rate - p)^2 = z^2 / n (p (1 - p) - share / 4)."""
    count, z = wins + losses + ties, 1.959964
    rate, share = (wins + ties / 2) / count, ties / (count + z**2)
    low, high = wilson_interval(wins + ties / 2, count, ties=ties)
    for end in (low, high):
        variance = end * (1 - end) - share / 4
        assert (rate - end) ** 2 == pytest.approx(z**2 / count * variance, rel=1e-4, abs=1e-9)
    assert low < rate < high
    plain = wilson_interval(wins + ties / 2, count)
    assert plain[0] < low
    assert high < plain[1]


def test_wilson_of_ties_holds_one_half() -> None:
    low, high = wilson_interval(128, 256)
    assert low < 0.5 < high
    assert 0.5 - low == pytest.approx(high - 0.5)


def test_bootstrap_of_a_constant_is_the_constant() -> None:
    assert bootstrap_interval(np.full(50, 0.25)) == (0.25, 0.25)


def test_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_coverage(world: World) -> None:
    """Both intervals hold the truth in 95 of 100 repetitions, within the sampling error of 200."""
    mean, win_rate = coverage(world, prompts=256, repeats=200, resamples=400)
    assert 0.91 <= mean <= 0.985
    assert 0.915 <= win_rate <= 0.99
