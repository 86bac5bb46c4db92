"""Diffusion-KTO: single images with labels, a baseline over the batch of all ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_prefopt import losses
from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.batches import LogRatios
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO, DiffusionKTO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.step_zero import moved

ROOT = Path(__file__).parents[2]
LINKS = {
    "kahneman_tversky": losses.kahneman_tversky,
    "sigmoid": losses.sigmoid,
    "risk_seeking": losses.risk_seeking,
}


def kto(backbone: StableDiffusion, beta: float = 1000.0, **options: object) -> DiffusionKTO:
    return DiffusionKTO(backbone, AdamW(1e-3), beta=beta, **options).train()


def by_hand(
    gains: list[float], labels: list[float], beta: float, link: str, like: float, dislike: float
) -> list[float]:
    """Return the loss of single images in double precision, one number at a time."""
    baseline = max(sum(gains) / len(gains), 0.0)

    def utility(x: float) -> float:
        if link == "kahneman_tversky":
            return 1 / (1 + math.exp(-x)) - 1  # the loss is 1 - sigmoid
        if link == "sigmoid":
            return -math.log1p(math.exp(-x))
        return math.log1p(math.exp(x))

    return [
        -like * y * utility(beta * (g - baseline))
        - dislike * (1 - y) * utility(-beta * (g - baseline))
        for g, y in zip(gains, labels, strict=True)
    ]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("shift", [0.3, -0.3], ids=["above the reference", "below it"])
def test_loss_of_single_images(backbone: StableDiffusion, link: str, shift: float) -> None:
    module = kto(backbone, 2.0, link=LINKS[link], like_weight=1.6, dislike_weight=0.4)
    pairs = module.form_pairs(image_pairs(4, sides=1))
    labels = torch.tensor([1.0, 0.0, 1.0, 0.25])
    gains = torch.tensor([0.2, -0.1, 0.4, 0.0]) + shift
    ratios = LogRatios(gains[:, None], torch.zeros(4))
    expected = by_hand(gains.tolist(), labels.tolist(), 2.0, link, 1.6, 0.4)
    got = module.losses(ratios, pairs._replace(labels=labels))
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert module.baseline.item() == pytest.approx(max(gains.mean().item(), 0), abs=1e-6)


def test_a_pair_is_one_liked_and_one_disliked_image(backbone: StableDiffusion) -> None:
    """The mean loss of pairs is that of their images as rows of their own."""
    module = kto(moved(backbone, 0.02), like_weight=1.6, dislike_weight=0.4)
    pairs = module.form_pairs(image_pairs(3))
    ratios = module.log_ratios(pairs)
    assert ratios.values.abs().max() > 0
    whole = module.losses(ratios, pairs).mean()
    labels = torch.tensor([1.0, 0.0] * 3)
    single = pairs._replace(latents=pairs.latents.flatten(0, 1)[:, None], labels=labels)
    rows = ratios._replace(values=ratios.values.flatten()[:, None])
    torch.testing.assert_close(module.losses(rows, single).mean(), whole)


def test_log_ratios_have_no_half(backbone: StableDiffusion) -> None:
    module = kto(moved(backbone, 0.02))
    ratios = module.log_ratios(module.form_pairs(image_pairs()))
    torch.testing.assert_close(ratios.values, ratios.reference_error - ratios.policy_error)


def test_step_zero(backbone: StableDiffusion) -> None:
    """Without a difference to the reference, an image costs one half and the baseline is 0."""
    module = kto(backbone)
    for sides in (1, 2):
        pairs = module.form_pairs(image_pairs(sides=sides))
        ratios = module.log_ratios(pairs)
        assert (ratios.values == 0).all()
        assert module.losses(ratios, pairs).tolist() == [0.5] * 3
        assert module.baseline == 0


def test_first_step_is_half_of_diffusion_dpo(backbone: StableDiffusion) -> None:
    """At the reference both gradients differ by that factor, at the same beta."""

    def gradient(module: DiffusionDPO) -> Tensor:
        module.zero_grad()
        pairs = module.form_pairs(image_pairs())
        module.losses(module.log_ratios(pairs), pairs).mean().backward()
        return module.backbone.policy.denoiser.conv_out.weight.grad.clone()

    half = gradient(kto(backbone))
    whole = gradient(DiffusionDPO(backbone, AdamW(1e-3), beta=1000.0).train())
    assert whole.abs().max() > 0
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
def test_gradients_are_finite_at_large_ratios(
    backbone: StableDiffusion, link: str, log_ratio: float
) -> None:
    module = kto(backbone, link=LINKS[link])
    pairs = module.form_pairs(image_pairs(2))
    values = torch.tensor([[log_ratio, -log_ratio], [0.0, 0.0]], requires_grad=True)
    value = module.losses(LogRatios(values, torch.zeros(2)), pairs)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(values.grad).all()


def test_the_baseline_has_no_gradient(backbone: StableDiffusion) -> None:
    """The gradient is that of a fixed number in its place."""
    module = kto(backbone, 1.0)
    pairs = module.form_pairs(image_pairs(2, sides=1))
    values = torch.tensor([[0.5], [1.5]], requires_grad=True)
    module.losses(LogRatios(values, torch.zeros(2)), pairs).sum().backward()
    share = 1 / (1 + math.exp(0.5))  # both are half a unit from the baseline 1
    assert values.grad.flatten().tolist() == pytest.approx([-share * (1 - share)] * 2)


def test_lists_are_refused(backbone: StableDiffusion) -> None:
    module = kto(backbone)
    pairs = module.form_pairs(image_pairs(sides=3))
    with pytest.raises(InputError, match="these lists have 3 images: take RankDPO"):
        module.losses(module.log_ratios(pairs), pairs)


@pytest.mark.slow
def test_the_baseline_is_that_of_both_ranks(tmp_path: Path, tiny_folder: str, shards: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = [str(tmp_path), tiny_folder, shards]
    subprocess.run(
        [*launch, "--standalone", "-m", "tests.helpers.two_ranks_kto", *arguments],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    a, b = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    assert len(a["baselines"]) == 4
    assert a["baselines"] == b["baselines"]
    means = [(x + y) / 2 for x, y in zip(a["means"], b["means"], strict=True)]
    expected = [max(mean, 0.0) for mean in means]
    assert a["baselines"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert a["means"] != b["means"]
    assert max(expected) > 0
