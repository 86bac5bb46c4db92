from __future__ import annotations

import numpy as np
import pytest

from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval


def test_wilson_against_the_published_form() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


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


def test_coverage() -> None:
    """The interval holds the true mean in 95 of 100 repetitions, within sampling error."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        values = rng.exponential(1.0, 256)
        low, high = bootstrap_interval(values, resamples=400, seed=seed)
        held += low <= 1.0 <= high
    assert 0.91 <= held / 300 <= 0.98
