"""Which images of one prompt become pairs: pure functions of their scores.

Images that score alike are never a pair: nothing is known of them.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["all", "best-worst", "rank-gap", "pareto"]


class PairIndices(NamedTuple):
    """Two images of a prompt, by their numbers."""

    chosen: int
    rejected: int


def calibrated(scores: Tensor) -> Tensor:
    """Return each image's mean probability to be preferred to another one, (M, K).

    It is CaPO's calibrated reward (arXiv 2502.02588): the mean over the other images of
    sigmoid(difference of the scores), which has the same range for every judge.

    Args:
        scores: (M, K) scores of M images by K judges.
    """
    wins = torch.sigmoid(scores[:, None] - scores[None])  # (M, M, K)
    return (wins.sum(1) - 0.5) / (len(scores) - 1)  # an image against itself is one half


def ranks(total: Tensor) -> list[int]:
    """Return how many images score higher than each.

    Args:
        total: (M,) scores.
    """
    return [int((total > score).sum()) for score in total]


def dominates(scores: Tensor) -> Tensor:
    """Return whether image i is as good as j for every judge and better for one, (M, M).

    Args:
        scores: (M, K) scores of M images by K judges.
    """
    one, other = scores[:, None], scores[None]
    return (one >= other).all(-1) & (one > other).any(-1)


def select_pairs(scores: Tensor, total: Tensor, how: How, rank_gap: int = 1) -> list[PairIndices]:
    """Return the pairs of a prompt, in a fixed order.

    Args:
        scores: (M, K) scores of M images by K judges.
        total: (M,) what they come to.
        how: `all` pairs; `best-worst`, the highest total against the lowest; `rank-gap`, all
            whose ranks are at least so far apart; `pareto`, an image that none dominates against
            one that dominates none.
        rank_gap: Least difference of the ranks with `rank-gap`.
    """
    order = sorted(range(len(total)), key=lambda image: -float(total[image]))
    if how == "best-worst":
        found = [(order[0], order[-1])]
    elif how == "pareto":
        better = dominates(scores)
        upper = [image for image in order if not better[:, image].any()]
        lower = [image for image in order if not better[image].any()]
        found = list(product(upper, lower))
    else:
        found = list(combinations(order, 2))
    places = ranks(total)
    least = rank_gap if how == "rank-gap" else 1
    # a lower rank is a higher total, so a gap of 1 also keeps ties out
    return [PairIndices(i, j) for i, j in found if places[j] - places[i] >= least]


def draw_subset(
    found: list[PairIndices], most: int | None, generator: torch.Generator
) -> list[PairIndices]:
    """Return so many of the pairs at most, drawn without replacement, in their order.

    Args:
        found: The pairs.
        most: How many; none: all.
        generator: Draws them.
    """
    if most is None or len(found) <= most:
        return found
    picked = torch.randperm(len(found), generator=generator)[:most]
    return [found[number] for number in sorted(picked.tolist())]
