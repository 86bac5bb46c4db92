"""Select pairs among the images of one prompt: pure functions of their scores.

Images of equal score never form a pair.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["all", "best-worst", "rank-gap", "pareto"]


class PairIndices(NamedTuple):
    """Two images of a prompt, by index."""

    chosen: int
    rejected: int


def calibrated(scores: Tensor) -> Tensor:
    """Return each image's mean probability of being preferred to another one, (M, K).

    It is CaPO's calibrated reward (arXiv 2502.02588): the mean over the other images of
    sigmoid(difference of the scores), which has the same range for every judge.

    Args:
        scores: (M, K) scores of M images by K judges.
    """
    wins = torch.sigmoid(scores[:, None] - scores[None])  # (M, M, K)
    return (wins.sum(1) - 0.5) / (len(scores) - 1)  # an image against itself is one half


def ranks(total: Tensor) -> list[int]:
    """Return the number of images with a higher score, for each image.

    Args:
        total: (M,) scores.
    """
    return [int((total > score).sum()) for score in total]


def dominates(scores: Tensor) -> Tensor:
    """Return whether image i dominates j: no score is lower and one is higher, (M, M).

    Args:
        scores: (M, K) scores of M images by K judges.
    """
    one, other = scores[:, None], scores[None]
    return (one >= other).all(-1) & (one > other).any(-1)


def select_pairs(scores: Tensor, total: Tensor, how: How, rank_gap: int = 1) -> list[PairIndices]:
    """Return the pairs of a prompt, in a fixed order.

    Args:
        scores: (M, K) scores of M images by K judges.
        total: (M,) ranking scores.
        how: `all` pairs; `best-worst`, the highest total against the lowest; `rank-gap`, all
            whose ranks are at least `rank_gap` apart; `pareto`, a Pareto-optimal image against
            one that dominates none.
        rank_gap: Minimum difference of the ranks with `rank-gap`.
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
    # a lower rank is a higher total, so a gap of 1 also excludes ties
    return [PairIndices(i, j) for i, j in found if places[j] - places[i] >= least]


def draw_subset(
    found: list[PairIndices], most: int | None, generator: torch.Generator
) -> list[PairIndices]:
    """Return a random subset of the pairs, drawn without replacement, in their order.

    Args:
        found: The pairs.
        most: Maximum number; None for all.
        generator: Random generator.
    """
    if most is None or len(found) <= most:
        return found
    picked = torch.randperm(len(found), generator=generator)[:most]
    return [found[number] for number in sorted(picked.tolist())]
