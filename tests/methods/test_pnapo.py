"""PNAPO: the noise of each image is the one it was sampled from; beta by gap and progress."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import PNAPO, DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.step_zero import check_step_zero, moved

SEEDS = torch.tensor([[11, 12], [21, 22], [31, 32]])
SCORES = torch.tensor([[0.9, 0.1], [0.5, 0.5], [3.0, 1.0]])


@pytest.fixture
def flow(tiny_sd35_folder: str) -> StableDiffusion3:
    """A small Stable Diffusion 3.5 with a LoRA."""
    torch.manual_seed(0)  # the LoRA's start
    return StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))


def pnapo(backbone: StableDiffusion3, **options: Any) -> PNAPO:
    return PNAPO(backbone, AdamW(1e-3), **{"beta": 2000.0} | options).train()


def tracked(module: PNAPO) -> Pairs:
    """Return pairs with seeds and scores of both sides."""
    return module.form_pairs(image_pairs()._replace(noise_seeds=SEEDS, scores=SCORES))


def noise_of(module: PNAPO, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the noise of each side as read from noised latents, and from the target."""
    noised = module.add_noise(pairs)
    sigma = noised.t_per_side.view(-1, 1, 1, 1)
    clean = pairs.latents.flatten(0, 1).double()
    mixed = (noised.latents.double() - (1 - sigma) * clean) / sigma
    return mixed.unflatten(0, (3, 2)), noised.target + pairs.latents


def test_each_side_has_the_noise_that_sampling_started_from(flow: StableDiffusion3) -> None:
    """The latents that the denoiser gets first when an image is sampled from the same seed."""
    module = pnapo(flow)
    first: list[Tensor] = []
    flow.policy.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: first.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    pairs = tracked(module)
    height, width = (side * flow.pixels_per_latent for side in pairs.latents.shape[-2:])
    how = Sampling(1, guidance=1.0, batch_size=6, height=height, width=width)
    sample(flow, ["a fox"] * 6, SEEDS.flatten(), how)
    mixed, target = noise_of(module, pairs)
    expected = first[0].unflatten(0, (3, 2))
    torch.testing.assert_close(mixed.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[:, 0], expected[:, 1])


def test_both_sides_have_one_level(flow: StableDiffusion3) -> None:
    module = pnapo(flow)
    plain = DiffusionDPO(flow, AdamW(1e-3), beta=1.0)
    pairs = tracked(module)
    assert torch.equal(module.add_noise(pairs).t, plain.add_noise(pairs).t)


def test_step_zero(flow: StableDiffusion3) -> None:
    module = pnapo(flow)
    check_step_zero(module, tracked(module), torch.full((3,), math.log(2)))


def by_hand(module: PNAPO, pairs: Pairs, scale: float, anneal: float) -> list[float]:
    """Return the loss in double precision, one pair at a time."""
    noised = module.add_noise(pairs)
    predict = module.backbone.predict
    target = noised.target.double()

    def errors() -> Tensor:
        predicted = predict(noised.latents, noised.t_per_side, noised.prompt).double()
        return (predicted.unflatten(0, (3, 2)) - target).square().mean((2, 3, 4))

    policy = errors()
    with module.backbone.as_reference():
        drop = errors() - policy
    losses = []
    for (chosen, rejected), (high, low) in zip(drop.tolist(), SCORES.tolist(), strict=True):
        factor = 2 / (1 + math.exp(-scale * (high - low))) - 1
        margin = 2000.0 * factor * anneal * 0.5 * (chosen - rejected)
        losses.append(math.log1p(math.exp(-margin)))
    return losses


def test_loss(flow: StableDiffusion3) -> None:
    module = pnapo(moved(flow), gap_scale=3.0)
    pairs = tracked(module)
    got = module.losses(module.log_ratios(pairs), pairs)
    expected = by_hand(module, pairs, 3.0, 1.0)
    assert got.tolist() == pytest.approx(expected, rel=1e-3)
    assert got[1].item() == pytest.approx(math.log(2))  # a tie has no margin
    assert max(abs(value - math.log(2)) for value in expected) > 0.01


def test_without_gap_and_annealing_it_is_diffusion_dpo_on_its_own_noise(
    flow: StableDiffusion3,
) -> None:
    module = pnapo(moved(flow), gap_scale=None)
    dpo = DiffusionDPO(flow, AdamW(1e-3), beta=2000.0).train()
    pairs = tracked(module)
    ratios = module.log_ratios(pairs)
    assert torch.equal(module.losses(ratios, pairs), dpo.losses(ratios, pairs))
    assert not torch.equal(ratios.values, dpo.log_ratios(pairs).values)  # of one noise for both


class At(PNAPO):
    """The method at another step of its training."""

    step = 0

    @property
    def global_step(self) -> int:
        """Number of the step."""
        return self.step


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (20, 1.0), (40, 0.75), (60, 0.5), (100, 0.5)]
)
def test_beta_halves_by_a_cosine(flow: StableDiffusion3, step: int, factor: float) -> None:
    module = At(flow, AdamW(1e-3), beta=1.0, gap_scale=None, anneal=(0.2, 0.6)).train()
    module.planned, module.step = 100, step
    assert module.beta_factor(tracked(module)).flatten().tolist() == pytest.approx([factor] * 3)


@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
def test_gradients_are_finite_at_large_ratios(flow: StableDiffusion3, log_ratio: float) -> None:
    module = pnapo(flow, beta=5000.0)
    values = torch.tensor([[log_ratio, -log_ratio]] * 3, requires_grad=True)
    loss = module.losses(LogRatios(values, torch.zeros(3)), tracked(module))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(values.grad).all()


def test_held_out_pairs_need_neither_seeds_nor_scores(flow: StableDiffusion3) -> None:
    module = pnapo(moved(flow)).eval()
    pairs = module.form_pairs(image_pairs())
    ratios = module.log_ratios(pairs)
    dpo = DiffusionDPO(flow, AdamW(1e-3), beta=2000.0).eval()
    assert torch.equal(ratios.values, dpo.log_ratios(pairs).values)
    assert torch.equal(module.losses(ratios, pairs), dpo.losses(ratios, pairs))


def test_pairs_without_seeds_or_scores_are_refused(flow: StableDiffusion3) -> None:
    module = pnapo(flow)
    with pytest.raises(InputError, match="have no `seeds` in their .json: generate them"):
        module.log_ratios(module.form_pairs(image_pairs()))
    pairs = tracked(module)._replace(scores=None)
    with pytest.raises(InputError, match="set `--model.gap_scale null`"):
        module.losses(module.log_ratios(pairs), pairs)


def test_resized_images_are_refused(flow: StableDiffusion3) -> None:
    module = pnapo(flow)
    frames = torch.tensor([32, 32, 0, 0, 32, 32]).expand(3, 2, 6).clone()
    module.log_ratios(tracked(module)._replace(frames=frames))
    frames[1, 0, 1] = 48
    with pytest.raises(InputError, match="does not belong to its noise.*--data.resolution"):
        pnapo(flow).log_ratios(tracked(module)._replace(frames=frames))


def test_only_flows(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="StableDiffusion is none: take a flow model, or Diff"):
        PNAPO(backbone, AdamW(1e-3), beta=1.0)
