"""Selection: worked by hand, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from lit_prefopt.diffusion import draws
from lit_prefopt.generate.selection import (
    PairIndices,
    calibrated,
    dominates,
    draw_subset,
    ranks,
    select_pairs,
)


def column(*scores: float) -> torch.Tensor:
    """Return the scores of one judge, (M, 1)."""
    return torch.tensor(scores)[:, None]


def test_ranks_count_who_is_better() -> None:
    assert ranks(torch.tensor([0.5, 2.0, 0.5, 1.0])) == [2, 0, 2, 1]


def test_calibrated_scores_by_hand() -> None:
    """sigmoid(log 3) = 3/4, sigmoid(log 9) = 9/10."""
    found = calibrated(column(math.log(9), math.log(3), 0.0))
    expected = [(0.75 + 0.9) / 2, (0.25 + 0.75) / 2, (0.1 + 0.25) / 2]
    assert found.squeeze(1).tolist() == pytest.approx(expected)


def test_calibrated_scores_of_any_judge_have_one_mean_and_one_range() -> None:
    order = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])[:, None]
    scores = order * torch.tensor([0.01, 1.0, 1000.0]) + 5
    found = calibrated(scores)
    assert found.mean(0).tolist() == pytest.approx([0.5] * 3, abs=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found.argsort(0), scores.argsort(0))
    # the last judge is sure of everything: what is left is the share of images it beats
    assert found[:, 2].sort().values.tolist() == pytest.approx([n / 7 for n in range(8)], abs=1e-3)


def test_all_pairs_are_there_but_ties() -> None:
    scores = column(0.5, 2.0, 0.5, 1.0)
    found = select_pairs(scores, scores[:, 0], "all")
    assert set(found) == {(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)}
    assert len(found) == 5
    assert select_pairs(column(1, 1, 1), torch.ones(3), "all") == []


def test_best_against_worst() -> None:
    scores = column(0.5, 2.0, 0.1, 1.0)
    assert select_pairs(scores, scores[:, 0], "best-worst") == [PairIndices(1, 2)]
    assert select_pairs(column(1, 1), torch.ones(2), "best-worst") == []


def test_least_rank_gap() -> None:
    scores = column(4.0, 3.0, 2.0, 1.0)
    assert select_pairs(scores, scores[:, 0], "rank-gap", 2) == [(0, 2), (0, 3), (1, 3)]
    assert select_pairs(scores, scores[:, 0], "rank-gap", 3) == [(0, 3)]
    assert select_pairs(scores, scores[:, 0], "rank-gap", 1) == select_pairs(
        scores, scores[:, 0], "all"
    )


def test_the_two_fronts() -> None:
    #                       best        by one      by the other  inside       worst
    scores = torch.tensor([[0.9, 0.6], [1.0, 0.1], [0.2, 1.0], [0.5, 0.5], [0.1, 0.0]])
    better = dominates(scores)
    assert better[0].tolist() == [False, False, False, True, True]
    assert better[:, 4].tolist() == [True, True, True, True, False]
    total = scores.sum(1)
    assert set(select_pairs(scores, total, "pareto")) == {(0, 4), (1, 4), (2, 4)}
    # without the last, the lower front is all but the best, which has the highest total
    rest = select_pairs(scores[:4], total[:4], "pareto")
    assert set(rest) == {(0, 1), (0, 2), (0, 3), (2, 1), (2, 3), (1, 3)}


def test_with_one_judge_the_fronts_are_best_and_worst() -> None:
    scores = torch.randn(9, 1)
    total = scores[:, 0]
    assert select_pairs(scores, total, "pareto") == select_pairs(scores, total, "best-worst")


def test_a_limit_draws_from_the_seed_and_keeps_the_order() -> None:
    scores = column(*range(6))
    found = select_pairs(scores, scores[:, 0], "all")
    few = [draw_subset(found, 4, draws.generator(seed, "pairs")) for seed in range(40)]
    assert all(len(set(one)) == 4 for one in few)
    assert all(one == sorted(one, key=found.index) for one in few)
    assert few[3] == draw_subset(found, 4, draws.generator(3, "pairs"))
    assert set().union(*few) == set(found)
    for most in (None, 15, 99):
        assert draw_subset(found, most, draws.generator(0, "pairs")) == found
