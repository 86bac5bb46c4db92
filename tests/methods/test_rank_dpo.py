"""RankDPO: weights of a list's pairs, and Diffusion-DPO on lists of two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.errors import InputError
from lit_prefopt.losses import discounted_gains, hinge
from lit_prefopt.methods import DiffusionDPO, RankDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.step_zero import moved

TWO = 1 / math.log(2) - 1 / math.log(3)
"""Difference of the discounts of the first two ranks."""


def rank_dpo(backbone: StableDiffusion, beta: float = 2.0, **options: object) -> RankDPO:
    return RankDPO(backbone, AdamW(1e-3), beta=beta, **options).train()


def by_hand(values: list[float], preferred: list[float], beta: float) -> float:
    """Return the loss of a list in double precision, one pair at a time (Algorithm 2)."""
    total = 0.0
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            gain = abs(2 ** preferred[i] - 2 ** preferred[j])
            discount = abs(1 / math.log(2 + i) - 1 / math.log(2 + j))
            total += gain * discount * math.log1p(math.exp(-beta * (values[i] - values[j])))
    return total


def lists(module: RankDPO, sides: int, count: int = 2) -> Pairs:
    return module.form_pairs(image_pairs(count, sides=sides))


def test_loss_of_lists_without_scores(backbone: StableDiffusion) -> None:
    """Of four images the best beats three, the next two, and so on."""
    module = rank_dpo(backbone)
    values = torch.tensor([[0.3, 0.1, -0.2, 0.4], [-0.1, 0.6, 0.2, 0.0]])
    got = module.losses(LogRatios(values, torch.zeros(2)), lists(module, 4))
    shares = [1.0, 2 / 3, 1 / 3, 0.0]
    expected = [by_hand(row, shares, 2.0) for row in values.tolist()]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_wins_are_counted_by_score_and_ties_are_not_compared(backbone: StableDiffusion) -> None:
    module = rank_dpo(backbone)
    values = torch.tensor([[0.3, 0.1, -0.2, 0.4]])
    pairs = lists(module, 4, 1)._replace(scores=torch.tensor([[9.0, 7.0, 7.0, -3.0]]))
    got = module.losses(LogRatios(values, torch.zeros(1)), pairs)
    expected = by_hand(values[0].tolist(), [1.0, 1 / 3, 1 / 3, 0.0], 2.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    weights = discounted_gains(module.preferred(values, pairs.scores))
    assert weights[0, 1, 2] == 0
    assert (weights[0] == weights[0].T).all()


def test_scores_can_be_the_gains(backbone: StableDiffusion) -> None:
    module = rank_dpo(backbone, gain="scores")
    values, shares = torch.tensor([[0.3, 0.1, -0.2]]), [0.9, 0.55, 0.05]
    pairs = lists(module, 3, 1)
    got = module.losses(
        LogRatios(values, torch.zeros(1)), pairs._replace(scores=torch.tensor([shares]))
    )
    assert got.item() == pytest.approx(by_hand(values[0].tolist(), shares, 2.0), rel=1e-5)
    with pytest.raises(InputError, match="`gain: scores` needs the scores.*--model.gain wins"):
        module.losses(LogRatios(values, torch.zeros(1)), pairs)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"link": hinge}])
def test_of_two_images_it_is_diffusion_dpo_times_a_number(
    backbone: StableDiffusion, options: dict[str, object]
) -> None:
    """The gains 1 and 0, and the discounts of both ranks, are the same for all pairs."""
    module = rank_dpo(moved(backbone, 0.02), 1000.0, **options)
    dpo = DiffusionDPO(backbone, AdamW(1e-3), beta=1000.0, **options).train()
    pairs = lists(module, 2, 3)._replace(labels=torch.tensor([1.0, 0.7, 0.5]))
    ratios = module.log_ratios(pairs)
    assert ratios.values.abs().max() > 0
    expected = TWO * dpo.losses(dpo.log_ratios(pairs), pairs)
    torch.testing.assert_close(module.losses(ratios, pairs), expected, rtol=1e-5, atol=1e-7)


def test_step_zero(backbone: StableDiffusion) -> None:
    """Each comparison costs ln 2 times its weight."""
    module = rank_dpo(backbone, 5000.0)
    pairs = lists(module, 3)
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    expected = by_hand([0.0] * 3, [1.0, 0.5, 0.0], 1.0)
    assert module.losses(ratios, pairs).tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
def test_gradients_are_finite_at_large_ratios(backbone: StableDiffusion, log_ratio: float) -> None:
    module = rank_dpo(backbone, 5000.0)
    values = torch.tensor([[log_ratio, 0.0, -log_ratio]], requires_grad=True)
    loss = module.losses(LogRatios(values, torch.zeros(1)), lists(module, 3, 1))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(values.grad).all()


def test_the_anchor_is_the_error_of_the_best_image(backbone: StableDiffusion) -> None:
    plain, anchored = rank_dpo(backbone), rank_dpo(backbone, anchor=2.0)
    pairs = lists(plain, 3)
    ratios = plain.log_ratios(pairs)
    torch.testing.assert_close(
        anchored.losses(ratios, pairs),
        plain.losses(ratios, pairs) + 2 * ratios.policy_error[:, 0],
    )


def test_a_step_orders_the_list(backbone: StableDiffusion) -> None:
    module = rank_dpo(backbone, 100.0)
    pairs = lists(module, 3)
    optimizer = torch.optim.Adam(module.backbone.policy.denoiser.parameters(), lr=5e-3)

    def loss() -> Tensor:
        return module.losses(module.log_ratios(pairs), pairs).mean()

    before = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before


def test_single_images_are_refused(backbone: StableDiffusion) -> None:
    module = rank_dpo(backbone)
    pairs = lists(module, 1)
    with pytest.raises(InputError, match="one image each: take DiffusionKTO"):
        module.losses(module.log_ratios(pairs), pairs)
