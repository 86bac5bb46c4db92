"""Losses of methods with a reward, against references in double precision and plain Python."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lit_prefopt.reward_groups import Groups, spread
from lit_prefopt.reward_losses import (
    clipped_surrogate,
    contrasted_errors,
    contrasted_loss,
    group_advantages,
    masked_surrogate,
    ratio,
)

SCORES = torch.tensor([[0.2, 0.9, 0.4, 0.1], [0.3, 0.3, 0.3, 0.3], [5.0, 5.0, 5.0, 7.0]])


@dataclass
class Round:
    """Scores and advantages of a round, as a record has them."""

    scores: Tensor
    advantages: Tensor

    def _replace(self, advantages: Tensor) -> Round:
        return Round(self.scores, advantages)


def test_group_advantages_against_plain_python() -> None:
    found = group_advantages(SCORES)
    for row, values in zip(found.tolist(), SCORES.tolist(), strict=True):
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        assert row == pytest.approx([(v - mean) / (deviation + 1e-4) for v in values], rel=1e-5)


def test_a_group_without_spread_has_no_advantage() -> None:
    """Exactly 0, also where the mean of equal scores is rounded."""
    assert (group_advantages(torch.full((3, 7), 0.1)) == 0).all()
    assert (group_advantages(torch.full((3, 7), 0.1), torch.tensor(1e-9)) == 0).all()


def test_advantages_end_at_five() -> None:
    scores = torch.zeros(1, 100)
    scores[0, 0] = 1
    assert group_advantages(scores)[0, 0] == 5  # 9.9 deviations
    assert group_advantages(-scores)[0, 0] == -5


def test_the_global_deviation_is_that_of_all_rounds_on_all_ranks() -> None:
    """Two rounds here; the other rank has the same numbers plus one."""
    rounds = [SCORES[:2], SCORES[2:]]
    flat = SCORES.flatten().tolist()
    both = [*flat, *(v + 1 for v in flat)]

    other = SCORES.flatten().double() + 1
    calls: list[Tensor] = []

    def two_ranks(value: Tensor) -> Tensor:
        calls.append(value)
        if value.ndim:  # count and total
            return value + torch.tensor([len(flat), other.sum()], dtype=torch.float64)
        return value + (other - statistics.fmean(both)).square().sum()

    deviation = statistics.pstdev(both)
    assert float(spread(rounds, two_ranks)) == pytest.approx(deviation, rel=1e-12)
    assert len(calls) == 2
    groups = Groups("global")
    begun = [Round(part.view(-1, 1), groups.begin(part).view(-1, 1)) for part in rounds]
    ended = torch.cat([one.advantages for one in groups.finish(begun, two_ranks)]).view(3, 4)
    expected = [
        [(v - statistics.fmean(row)) / (deviation + 1e-4) for v in row] for row in SCORES.tolist()
    ]
    torch.testing.assert_close(ended, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert (ended[1] == 0).all()


def surrogate(log_ratio: float, advantage: float, eps: float) -> float:
    """PPO's loss of one step, as the paper writes it."""
    r = math.exp(log_ratio)
    return -min(r * advantage, min(max(r, 1 - eps), 1 + eps) * advantage)


@pytest.mark.parametrize("advantage", [-2.5, -0.3, 0.0, 0.7, 5.0])
def test_clipped_surrogate_against_plain_python(advantage: float) -> None:
    values = [-2.0, -0.11, -0.05, 0.0, 0.05, 0.11, 2.0]
    log_ratios = torch.tensor([[values]], dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(log_ratios, torch.tensor([[advantage]], dtype=torch.float64), 0.1)
    expected = [surrogate(x, advantage, 0.1) for x in values]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    moved = [x * advantage > 0 and abs(x) > 0.106 for x in values]
    slopes = [0.0 if m else -advantage * math.exp(x) for m, x in zip(moved, values, strict=True)]
    assert log_ratios.grad is not None
    assert log_ratios.grad.flatten().tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("advantage", [-5.0, 5.0])
def test_gradients_are_finite_at_a_hundred(advantage: float) -> None:
    for loss in (
        lambda x: clipped_surrogate(x, torch.tensor([[advantage]]), 1e-4),
        lambda x: masked_surrogate(x, torch.tensor([[advantage]]), x.detach().abs(), 1e-5),
    ):
        log_ratios = torch.tensor([[[-100.0, 0.0, 100.0]]], requires_grad=True)
        value = loss(log_ratios)
        assert value.isfinite().all()
        value.sum().backward()
        assert log_ratios.grad is not None
        assert log_ratios.grad.isfinite().all()
        if advantage < 0:  # a ratio that is far too large is pulled back, unless it is masked
            assert (log_ratios.grad[..., 2] > 0).all()


def test_a_ratio_is_exp_up_to_e_to_the_five() -> None:
    x = torch.tensor([-3.0, 0.0, 1e-4, 4.9, 6.0], dtype=torch.float64, requires_grad=True)
    found = ratio(x)
    assert torch.equal(found[:4], x[:4].exp())
    assert found[4].item() == pytest.approx(2 * math.exp(5))
    [slope] = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope[:4], x[:4].exp().detach())
    assert slope[4].item() == pytest.approx(math.exp(5))


def test_the_mask_drops_what_is_far_and_moves_away() -> None:
    log_ratios = torch.tensor([[[0.2, 0.2, -0.2, -0.2]]])
    divergence = torch.tensor([[[2e-5, 0.5e-5, 2e-5, 0.5e-5]]])
    up = masked_surrogate(log_ratios, torch.tensor([[2.0]]), divergence, 1e-5)
    down = masked_surrogate(log_ratios, torch.tensor([[-2.0]]), divergence, 1e-5)
    r = [math.exp(x) for x in (0.2, 0.2, -0.2, -0.2)]
    assert up.flatten().tolist() == pytest.approx([0, *(-2 * x for x in r[1:])])
    assert down.flatten().tolist() == pytest.approx([2 * r[0], 2 * r[1], 0, 2 * r[3]])


def test_within_the_trust_region_mask_and_clip_agree() -> None:
    """In the limit of ratios near 1, both are the plain policy gradient."""
    log_ratios = torch.tensor([[[0.01, -0.02]], [[0.0, 0.03]]], dtype=torch.float64)
    advantages = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    near = torch.zeros_like(log_ratios)
    masked = masked_surrogate(log_ratios, advantages, near, 1e-5)
    assert torch.equal(masked, clipped_surrogate(log_ratios, advantages, 0.1))
    assert torch.equal(masked, -advantages[..., None] * log_ratios.exp())


def nft(clean: Tensor, old: Tensor, x0: Tensor, advantage: float, beta: float) -> float:
    """DiffusionNFT's loss of one image, from velocities at sigma 0.8, in double precision."""
    sigma, x = 0.8, torch.linspace(-1, 1, x0.numel(), dtype=torch.float64).view_as(x0)
    v, v_old = (x - clean) / sigma, (x - old) / sigma
    losses = []
    for mixed in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
        residual = x - sigma * mixed - x0
        losses.append(residual.pow(2).mean().item() / max(residual.abs().mean().item(), 1e-5))
    good = min(max(advantage / 10 + 0.5, 0.0), 1.0)
    return 5 / beta * (good * losses[0] + (1 - good) * losses[1])


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("advantage", [-5.0, -1.0, 0.0, 2.5, 5.0])
def test_nft_against_double_precision(beta: float, advantage: float) -> None:
    random = torch.Generator().manual_seed(0)
    clean, old, x0 = (torch.randn(3, 2, 4, 5, 6, generator=random) for _ in range(3))
    errors = contrasted_errors(clean, old, x0, beta)
    found = contrasted_loss(*errors, torch.full((3, 2), advantage), beta)
    for row in range(3):
        for side in range(2):
            parts = (part[row, side].double() for part in (clean, old, x0))
            assert found[row, side].item() == pytest.approx(nft(*parts, advantage, beta), rel=1e-5)


def test_nft_where_policy_and_sampling_policy_agree() -> None:
    """The loss does not depend on the score, its gradient is the score's sign; 0 at the mean."""
    random = torch.Generator().manual_seed(0)
    old, x0 = (torch.randn(5, 1, 4, 5, 6, generator=random).double() for _ in range(2))
    advantages = torch.tensor([-5.0, -2.0, 0.0, 2.0, 5.0]).double()[:, None]
    clean = old.clone().requires_grad_()
    found = contrasted_loss(*contrasted_errors(clean, old, x0, 0.5), advantages, 0.5)
    residual = old - x0
    size = residual.abs().mean((2, 3, 4))
    torch.testing.assert_close(found.detach(), 10 * residual.pow(2).mean((2, 3, 4)) / size)
    found.sum().backward()
    # 5 / beta times beta (2 r - 1) = A times the gradient of the relative error
    slope = advantages / size * 2 / residual[0].numel()
    torch.testing.assert_close(clean.grad, slope[..., None, None, None] * residual)
    assert clean.grad is not None
    assert (clean.grad[2] == 0).all()


def test_nft_of_two_point_data_points_where_the_theorem_says() -> None:
    """With squared errors the optimum is the old prediction plus 2 / beta times the shift.

    Two clean values -1 and 1, equally likely given the noised one, with probabilities 0.2 and 0.9
    of being good: the positive policy predicts (0.9 - 0.2) / 1.1, and half of 1.1 is its share.
    """
    beta, clean, old = 0.5, torch.zeros(1, dtype=torch.float64, requires_grad=True), 0.0

    def loss(prediction: Tensor) -> Tensor:
        change = beta * (prediction - old)
        errors = [
            good * (old + change - x0) ** 2 + (1 - good) * (old - change - x0) ** 2
            for x0, good in ((-1.0, 0.2), (1.0, 0.9))
        ]
        return torch.stack(errors).mean()

    best = 2 / beta * (0.55 * (0.7 / 1.1))
    [slope] = torch.autograd.grad(loss(clean), clean)
    [at_best] = torch.autograd.grad(loss(clean + best), clean)
    assert slope.item() < 0
    # the denominator of the relative error keeps the side of the step: the theorem's direction
    assert at_best.item() == pytest.approx(0, abs=1e-12)
    many = torch.tensor([[-1.0], [1.0]]).view(2, 1, 1, 1, 1).double()
    prediction = torch.zeros_like(many).requires_grad_()
    advantages = torch.tensor([[(0.2 - 0.5) * 10], [(0.9 - 0.5) * 10]]).double()
    errors = contrasted_errors(prediction, torch.zeros_like(many), many, beta)
    contrasted_loss(*errors, advantages, beta).mean().backward()
    assert prediction.grad is not None
    assert prediction.grad.sum() < 0


@pytest.mark.parametrize("size", [0.0, 1e-6, 100.0, 1e4])
def test_nft_gradients_are_finite(size: float) -> None:
    clean = torch.full((1, 1, 2, 2, 2), size, requires_grad=True)
    zeros = torch.zeros(1, 1, 2, 2, 2)
    errors = contrasted_errors(clean, zeros, zeros, 1.0)
    contrasted_loss(*errors, torch.tensor([[5.0]]), 1.0).sum().backward()
    assert clean.grad is not None
    assert clean.grad.isfinite().all()
