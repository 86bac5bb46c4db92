"""Means and win rates with confidence intervals."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]


class PairedStatistics(NamedTuple):
    """The mean of paired differences and the share of wins, with 95 % intervals over prompts."""

    difference: float
    difference_ci: Interval
    win_rate: float
    win_rate_ci: Interval


def paired_statistics(differences: NDArray[np.float64]) -> PairedStatistics:
    """Compute mean and win rate with intervals; a tie counts one half.

    Args:
        differences: One per prompt, (P,), not empty.
    """
    wins, count = float(((np.sign(differences) + 1) / 2).sum()), len(differences)
    return PairedStatistics(
        float(differences.mean()),
        bootstrap_interval(differences),
        wins / count,
        wilson_interval(wins, count, ties=int((differences == 0).sum())),
    )


def bootstrap_interval(
    values: NDArray[np.float64], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of the mean (B. Efron, 1979).

    Args:
        values: One value per prompt, (N,).
        level: Confidence level.
        resamples: Number of resamples.
        seed: The same values always give the same interval.
    """
    rng = np.random.default_rng(seed)
    # In chunks: 10,000 resamples of 10,000 values at once would take a gigabyte.
    rows = max(1, 10_000_000 // len(values))
    means = [
        values[rng.integers(0, len(values), (min(rows, resamples - done), len(values)))].mean(1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def two_way_interval(
    values: NDArray[np.float64], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of a mean over runs and prompts, both resampled.

    With few runs it is too narrow: three of them vary less than all runs would.

    Args:
        values: One value per run and prompt, (R, N).
        level: Confidence level.
        resamples: Number of resamples.
        seed: The same values always give the same interval.
    """
    rng = np.random.default_rng(seed)
    runs, prompts = values.shape
    # the mean over a resample is a weighted mean, so no resample is materialized
    run_weights = rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
    prompt_weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts
    means = np.einsum("br,rn,bn->b", run_weights, values, prompt_weights, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(wins: float, count: int, level: float = 0.95, ties: int = 0) -> Interval:
    """Return Wilson's score interval of a rate (E. B. Wilson, 1927).

    A tie that counts one half has a smaller variance than a win or loss. With `ties`, the score's
    variance is that of wins, ties and losses, p (1 - p) - ties / 4, with the share of ties shrunk
    slightly towards zero, so that the interval has a width even if all tie; without ties it is
    Wilson's interval.

    Args:
        wins: Number of wins; a tie counts one half.
        count: Number of comparisons.
        level: Confidence level.
        ties: Number of ties.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, k = wins / count, z * z / count
    share = ties / (count + z * z)
    centre = (rate + k / 2) / (1 + k)
    half = math.sqrt(max(0.0, k * (rate * (1 - rate) + k / 4) - k * (1 + k) * share / 4)) / (1 + k)
    return max(0.0, centre - half), min(1.0, centre + half)
