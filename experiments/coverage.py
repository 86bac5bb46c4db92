"""How often the intervals of an evaluation hold the truth, by simulation.

    python -m experiments.coverage            # 256 prompts, 1,000 repeats
    python -m experiments.coverage --report true

95 of 100 should; of 1,000 repeats 93.6 to 96.4 % are within sampling error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jsonargparse import auto_cli
from numpy.random import Generator
from numpy.typing import NDArray

from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval

Draw = Callable[[Generator, int], NDArray[np.float64]]


class World(NamedTuple):
    """Where the differences between two models come from, and what is true there."""

    name: str
    draw: Draw
    mean: float
    win_rate: float  # a tie counts one half


def _toy(rng: Generator, n: int) -> NDArray[np.float64]:
    """Rewards near 1 that mostly move little and sometimes much: what the toy world shows."""
    large = rng.random(n) < 0.15
    return np.where(large, rng.normal(0.12, 0.2, n), rng.normal(0.01, 0.02, n))


def _ties(rng: Generator, n: int) -> NDArray[np.float64]:
    """Half of the prompts tie, a third is won by steps of one quarter."""
    return rng.choice([0.0, 0.25, -0.25], n, p=[0.5, 0.33, 0.17])


def _rare(rng: Generator, n: int) -> NDArray[np.float64]:
    """Nearly all prompts tie: 4 % are won."""
    return (rng.random(n) < 0.04).astype(np.float64)


# P(X > 0) of a normal distribution, at mean / deviation
UP_HALF, UP_SIX_TENTHS = 0.691462, 0.725747

WORLDS = [
    World("nothing differs in the mean, normal", lambda r, n: r.normal(0, 1, n), 0, 0.5),
    World("normal, half a deviation better", lambda r, n: r.normal(0.5, 1, n), 0.5, UP_HALF),
    World("skewed (exponential less 0.8)", lambda r, n: r.exponential(1, n) - 0.8, 0.2, 0.449329),
    World("heavy tails (Student's t, 3 degrees)", lambda r, n: r.standard_t(3, n), 0, 0.5),
    World("mostly little, sometimes much", _toy, 0.0265, 0.85 * UP_HALF + 0.15 * UP_SIX_TENTHS),
    World("half of the prompts tie", _ties, 0.04, 0.58),
    World("nearly all prompts tie", _rare, 0.04, 0.52),
]


def coverage(
    world: World, prompts: int, repeats: int, seed: int = 0, resamples: int = 2_000
) -> tuple[float, float]:
    """Return the shares of repeats in which the intervals of mean and win rate hold the truth.

    Args:
        world: Where the differences come from.
        prompts: Differences of a repeat.
        repeats: Number of repeats.
        seed: Of the first one; the others follow.
        resamples: Resamples of each bootstrap.
    """
    held = np.zeros(2)
    for repeat in range(repeats):
        values = world.draw(np.random.default_rng([seed, repeat]), prompts)
        low, high = bootstrap_interval(values, resamples=resamples, seed=repeat)
        wins, ties = float(((np.sign(values) + 1) / 2).sum()), int((values == 0).sum())
        least, most = wilson_interval(wins, prompts, ties=ties)
        held += [low <= world.mean <= high, least <= world.win_rate <= most]
    mean, win_rate = (held / repeats).tolist()
    return mean, win_rate


def main(prompts: int = 256, repeats: int = 1_000, report: bool = False) -> None:
    """Print the table.

    Args:
        prompts: Differences of a repeat.
        repeats: Number of repeats.
        report: Write a report as well.
    """
    lines = [
        "| differences | mean held | win rate held |",
        "|---|---|---|",
    ]
    for world in WORLDS:
        mean, rate = coverage(world, prompts, repeats)
        lines.append(f"| {world.name} | {mean:.1%} | {rate:.1%} |")
        print(lines[-1], flush=True)
    if report:
        from experiments.common import write_report

        head = f"95 % intervals, {prompts} prompts, {repeats:,} repeats.\n\n"
        print(write_report("coverage", head + "\n".join(lines)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
