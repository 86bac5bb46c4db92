"""Every method on a flow: nothing at step 0, finite gradients of a LoRA, the same loss by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.errors import InputError
from lit_prefopt.losses import ipo
from lit_prefopt.methods import (
    D3PO,
    SPO,
    ConsistencyDistillation,
    ConsistencyDPO,
    CurriculumDPO,
    DenseRewardDPO,
    Di3PO,
    DiffusionDPO,
    SPINDiffusion,
    SupervisedFineTuning,
)
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import LevelDraw, Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.judges import SEEDS, TEXTS, Brightness
from tests.helpers.step_zero import check_step_zero, moved

BETA = 2000.0
READINGS: tuple[Literal["noise", "velocity", "image"], ...] = ("noise", "velocity", "image")


@pytest.fixture
def flow(tiny_sd35_folder: str) -> StableDiffusion3:
    """A small Stable Diffusion 3.5 with a LoRA."""
    torch.manual_seed(0)  # the LoRA's start
    return StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))


def dpo(backbone: Backbone, **options: object) -> DiffusionDPO:
    return DiffusionDPO(backbone, AdamW(1e-3), **{"beta": BETA} | options).train()


OFFLINE: dict[str, Callable[[Backbone], DiffusionDPO]] = {
    "Diffusion-DPO": dpo,
    **{f"weighting {of}": lambda b, of=of: dpo(b, weighting=of) for of in READINGS},
    "discounted": lambda b: dpo(b, gamma=0.9),
    "loser scaling": lambda b: dpo(b, chosen_protection=0.5, weighting="noise"),
    "Curriculum-DPO": lambda b: CurriculumDPO(b, AdamW(1e-3), beta=BETA).train(),
    "Di3PO": lambda b: Di3PO(
        b, AdamW(1e-3), beta=BETA, masked=True, mask_dilation=1, weighting="image"
    ).train(),
    "SPIN": lambda b: SPINDiffusion(b, AdamW(1e-3), beta=BETA).train(),
    "SPIN, exact": lambda b: SPINDiffusion(
        b, AdamW(1e-3), beta=3.0, exact=True, sampling=Sampling(3, guidance=1.0, eta=0.7)
    ).train(),
}


def masked_pairs() -> Pairs:
    """Return pairs with a mask over the upper half."""
    masks = torch.zeros(3, 1, 32, 32)
    masks[:, :, :16] = 1
    return image_pairs()._replace(masks=masks)


@pytest.mark.parametrize("name", OFFLINE)
def test_step_zero_of_methods_on_stored_pairs(name: str, flow: StableDiffusion3) -> None:
    module = OFFLINE[name](flow)
    pairs = module.form_pairs(masked_pairs())
    check_step_zero(module, pairs, torch.full((3,), math.log(2)))


HOW = Sampling(steps=4, guidance=3.0, eta=0.7, batch_size=3)
COMMON = {"judge": Brightness(), "beta": 10.0, "sampling": HOW}
TRAJECTORIES = {"drawn_steps": 3, "trajectories": 3}
ON_POLICY: dict[str, Callable[[Backbone, Sampling], OnPolicyModule]] = {
    "SPO": lambda b, how: SPO(
        b, AdamW(1e-3), **COMMON | {"sampling": how}, eps=0.1, candidates=3, first=1, inner=0,
        threshold=0.0,
    ),
    "D3PO": lambda b, how: D3PO(
        b, AdamW(1e-3), **COMMON | TRAJECTORIES | {"sampling": how}, eps=0.1
    ),
    "dense reward": lambda b, how: DenseRewardDPO(
        b, AdamW(1e-3), **COMMON | TRAJECTORIES | {"sampling": how}, delta=0.1, gamma=0.9, kept=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["flow", "dance", "cps"])
@pytest.mark.parametrize("name", ON_POLICY)
def test_step_zero_of_methods_on_policy(
    name: str, form: Literal["flow", "dance", "cps"], flow: StableDiffusion3
) -> None:
    """Steps of all levels, from pure noise to the image, in each stochastic form."""
    how = Sampling(steps=4, guidance=3.0, eta=0.7, batch_size=3, stochastic=form)
    module = ON_POLICY[name](flow, how).train()
    collected = module.collect(TEXTS, SEEDS)
    assert collected.t.dtype == torch.float64
    rows = torch.arange(len(collected.seeds))
    steps = module.draw(collected, rows, collected.seeds)
    assert steps.sides == 2
    levels = {round(t, 4) for t in torch.cat([steps.t, steps.t_next]).flatten().tolist()}
    assert 0.0 in levels or name != "SPO"
    check_step_zero(module, steps, torch.full((len(rows),), math.log(2)))


def test_sft_learns_the_velocity(flow: StableDiffusion3) -> None:
    """The error of the chosen side is that of noise - latents, worked out by hand."""
    module = SupervisedFineTuning(flow, AdamW(1e-3)).train()
    pairs = module.form_pairs(image_pairs())
    ratios = module.log_ratios(pairs)
    noised = module.add_noise(pairs)
    sigma = noised.t.view(-1, 1, 1, 1).float()
    noise = (noised.latents - (1 - sigma) * pairs.latents[:, 0]) / sigma
    predicted = flow.predict(noised.latents, noised.t, noised.prompt)
    expected = (predicted - (noise - pairs.latents[:, 0])).square().mean((1, 2, 3))
    torch.testing.assert_close(module.losses(ratios, pairs), expected, atol=1e-4, rtol=1e-4)
    assert module.eval().form_pairs(image_pairs()).sides == 2


def readings(predicted: Tensor, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Return noise, velocity and image as read from a velocity at x."""
    return {
        "noise": x + (1 - sigma) * predicted,
        "velocity": predicted,
        "image": x - sigma * predicted,
    }


@pytest.mark.parametrize("of", READINGS)
def test_weighting_is_diffusion_dpo_on_errors_of_that_reading(
    flow: StableDiffusion3, of: Literal["noise", "velocity", "image"]
) -> None:
    """Loss, anchor and logged errors against errors of the noise, velocity or image by hand."""
    moved(flow)
    module = dpo(flow, weighting=of, anchor=0.3)
    pairs = module.form_pairs(image_pairs(5))
    ratios = module.log_ratios(pairs)
    noised = module.add_noise(pairs)
    sigma = noised.t_per_side.view(-1, 1, 1, 1)
    clean = pairs.latents.flatten(0, 1).double()
    noise = (noised.latents.double() - (1 - sigma) * clean) / sigma
    true = {"noise": noise, "velocity": noise - clean, "image": clean}[of]

    def errors() -> Tensor:
        predicted = flow.predict(noised.latents, noised.t_per_side, noised.prompt).double()
        read = readings(predicted, noised.latents.double(), sigma)[of]
        return (read - true).square().mean((1, 2, 3)).view(5, 2)

    policy = errors()
    with flow.as_reference():
        reference = errors()
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(ratios.policy_error.double(), policy, **close)
    torch.testing.assert_close(ratios.reference_error.double(), reference, **close)
    z = -BETA / 2 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    expected = torch.log1p((-z).exp()) + 0.3 * policy[:, 0]
    assert z.abs().max() > 0.01
    torch.testing.assert_close(
        module.losses(ratios, pairs).double(), expected, atol=BETA * 1e-4, rtol=1e-3
    )


def test_a_velocity_weight_changes_no_bit_of_a_flow(flow: StableDiffusion3) -> None:
    plain, weighted = dpo(moved(flow)), dpo(flow, weighting="velocity")
    pairs = plain.form_pairs(image_pairs())
    assert torch.equal(plain.log_ratios(pairs).values, weighted.log_ratios(pairs).values)
    assert plain.log_ratios(pairs).values.abs().max() > 0


def test_a_noise_weight_changes_no_bit_of_an_epsilon_model(backbone: StableDiffusion) -> None:
    plain, weighted = dpo(moved(backbone, 0.02)), dpo(backbone, weighting="noise")
    pairs = plain.form_pairs(image_pairs())
    assert torch.equal(plain.log_ratios(pairs).values, weighted.log_ratios(pairs).values)
    other = dpo(backbone, weighting="image").log_ratios(pairs)
    assert not torch.allclose(plain.log_ratios(pairs).values, other.values)


def test_one_table_of_reference_errors_serves_all_weightings(flow: StableDiffusion3) -> None:
    """Stored errors are the denoiser's own, and are weighted like those of the policy."""
    moved(flow)
    pairs = dpo(flow).form_pairs(image_pairs())
    stored = dpo(flow).log_ratios(pairs).reference_error.detach()
    for of in (None, *READINGS):
        module = dpo(flow, weighting=of)
        known = module.log_ratios(pairs._replace(reference_error=stored[:, None]))
        asked = module.log_ratios(pairs)
        assert torch.equal(known.values, asked.values)
        assert torch.equal(known.reference_error, asked.reference_error)


@pytest.mark.parametrize("of", READINGS)
def test_loser_scaling_does_not_depend_on_the_weight(
    flow: StableDiffusion3, of: Literal["noise", "velocity", "image"]
) -> None:
    """Both sides' gradients have the same factor, so that their ratio stays."""
    moved(flow)

    def scale(weighting: str) -> Tensor:
        module = dpo(flow, chosen_protection=0.9, weighting=weighting, link=ipo, beta=1.0)
        pairs = module.form_pairs(image_pairs())
        ratios = module.log_ratios(pairs)
        values = ratios.values.detach().requires_grad_()
        module.losses(ratios._replace(values=values), pairs).sum().backward()
        return values.grad[:, 1] / values.grad[:, 0]

    torch.testing.assert_close(scale(of), scale("velocity"))
    assert (scale(of) > -1).any()  # some losers are scaled down


def test_pure_noise_weighs_nothing_as_noise(flow: StableDiffusion3) -> None:
    """At sigma 1 the noise is known: weight 0, and no NaN from the loser's scale."""
    module = dpo(flow, weighting="noise", chosen_protection=0.9)
    t = torch.ones(2, dtype=torch.float64)
    weight = flow.process.error_weight(t, "noise")
    assert weight.tolist() == [0, 0]
    ones = torch.ones(2, 2)
    ratios = LogRatios(ones * 0, t, ones * 0, ones * 0, ones * 0)
    pairs = module.form_pairs(image_pairs(2))
    assert module.losses(ratios, pairs).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("draw", ["uniform", "logit-normal", "shifted", "schedule"])
def test_the_backbone_draws_the_levels(
    draw: Literal["uniform", "logit-normal", "shifted", "schedule"], tiny_sd35_folder: str
) -> None:
    """Each pair's level is the distribution's quantile at the pair's own number."""
    backbone = StableDiffusion3(tiny_sd35_folder, levels=LevelDraw(draw), lora=LoRA(4))
    module, plain = dpo(backbone, gamma=0.9), dpo(backbone)
    pairs = plain.form_pairs(image_pairs(6))
    levels, discounted = plain.add_noise(pairs).t, module.add_noise(pairs).t
    assert levels.dtype == torch.float64
    assert (discounted >= levels).all()  # a discount draws noisier levels
    assert (discounted > levels).any()
    alone = plain.add_noise(pairs._replace(seeds=pairs.seeds[2:3], latents=pairs.latents[2:3]))
    assert torch.equal(alone.t, levels[2:3])


@pytest.mark.parametrize("method", [ConsistencyDPO, ConsistencyDistillation])
def test_methods_of_consistency_models_refuse_a_flow(
    method: type[ConsistencyDPO], flow: StableDiffusion3
) -> None:
    numbers = {"beta": 200.0} if method is ConsistencyDPO else {}
    with pytest.raises(InputError, match="StableDiffusion3 is none: take the backbone Latent"):
        method(flow, AdamW(1e-3), **numbers)


def test_exact_spin_refuses_a_weighting(flow: StableDiffusion3) -> None:
    with pytest.raises(InputError, match="leave .*`weighting`.* out"):
        SPINDiffusion(flow, AdamW(1e-3), beta=3.0, exact=True, weighting="noise")
