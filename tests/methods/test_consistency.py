"""Consistency-DPO and the distillation of consistency models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LatentConsistency, LoRA, StableDiffusion
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.consistency_targets import consistency_points
from lit_prefopt.diffusion.rollout import Rollout
from lit_prefopt.errors import InputError
from lit_prefopt.methods import ConsistencyDistillation, ConsistencyDPO, DiffusionDPO
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs

WAYS = {
    "full": {},
    "full, bfloat16 teacher, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "lora": {"lora": LoRA(4)},
    "lora, bfloat16": {"lora": LoRA(4), "dtype": "bfloat16"},
}
Make = Callable[..., LatentConsistency]


@pytest.fixture
def lcm(tiny_lcm_folder: str, tiny_folder: str) -> Make:
    """Makes latent consistency models with a teacher."""
    return lambda **options: LatentConsistency(tiny_lcm_folder, teacher=tiny_folder, **options)


def dpo(backbone: LatentConsistency, **options: object) -> ConsistencyDPO:
    return ConsistencyDPO(backbone, AdamW(1e-3), **{"beta": 200.0} | options)


def loss_of(module: PreferenceDiffusionModule) -> Tensor:
    pairs = module.form_pairs(image_pairs())
    return module.losses(module.log_ratios(pairs), pairs).mean()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_step_zero(way: dict[str, object], lcm: Make) -> None:
    """Policy and reference agree to the last bit, so the margin is zero and not nearly zero."""
    module = dpo(lcm(**way)).train()
    pairs = module.form_pairs(image_pairs())
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    assert torch.equal(ratios.policy_error, ratios.reference_error)
    assert (ratios.policy_error > 1e-3).all()
    losses = module.losses(ratios, pairs)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-6)
    losses.mean().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_residuals_and_loss_in_double_precision(lcm: Make) -> None:
    """The formulas of the paper and its code, all but the networks in double precision."""
    backbone = lcm()
    module = dpo(backbone, w=(5.0, 15.0))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.policy.denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    pairs = module.form_pairs(image_pairs())
    with torch.no_grad():
        ratios = module.log_ratios(pairs)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    empty = backbone.embed([""])["hidden"]

    def answer(net: torch.nn.Module, x: Tensor, t: int, w: float, hidden: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(8) / 7)
        angles = 1000 * w * frequencies
        told = torch.cat([angles.sin(), angles.cos()])[None]
        said = net(x.float(), t, hidden, timestep_cond=told).sample.double()
        clean = (x - (1 - abar[t]).sqrt() * said) / abar[t].sqrt()
        scaled = t / 0.1
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25) ** 0.5 * clean

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (((a - b) ** 2 + 1e-6).sqrt() - 1e-3).mean()

    for row, seed in enumerate(pairs.seeds):
        n = int(draws.uniform(seed[None], "t") * 50)
        w = 5 + 10 * float(draws.uniform(seed[None], "guidance"))
        noise = draws.normal(seed[None], (4, 8, 8), "noise").double()
        high, low = 20 * (n + 1) - 1, max(20 * n - 1, 0)
        assert int(ratios.t[row]) == high
        found = {}
        for side in range(2):
            hidden = pairs.prompt["hidden"][row : row + 1]
            x = pairs.latents[row : row + 1, side].double()
            x = abar[high].sqrt() * x + (1 - abar[high]).sqrt() * noise
            with torch.no_grad():
                cond, uncond = (
                    backbone.teacher(x.float(), high, h).sample.double() for h in (hidden, empty)
                )
                said = cond + w * (cond - uncond)
                clean = (x - (1 - abar[high]).sqrt() * said) / abar[high].sqrt()
                lower = abar[low].sqrt() * clean + (1 - abar[low]).sqrt() * said
                target = answer(backbone.policy.frozen, lower, low, w, hidden)
                for name, net in (
                    ("policy", backbone.policy.denoiser),
                    ("reference", backbone.policy.frozen),
                ):
                    found[name, side] = distance(answer(net, x, high, w, hidden), target)
        ours = {"policy": ratios.policy_error, "reference": ratios.reference_error}
        for (name, side), residual in found.items():
            assert float(ours[name][row, side]) == pytest.approx(float(residual), rel=1e-4)
        drops = [found["policy", side] - found["reference", side] for side in (0, 1)]
        z = -200 * (drops[0] - drops[1])
        assert abs(z) > 0.1
        assert float(ratios.margin(200)[row]) == pytest.approx(float(z), abs=0.02)
        loss = -torch.nn.functional.logsigmoid(z)
        assert float(module.losses(ratios, pairs)[row]) == pytest.approx(float(loss), abs=0.02)


def test_sides_share_all_that_is_drawn(lcm: Make) -> None:
    module = dpo(lcm())
    batch = image_pairs()
    same = batch._replace(images=batch.images[:, :1].expand(-1, 2, -1, -1, -1))
    points = consistency_points(module.backbone, module.form_pairs(same), (5.0, 15.0))
    for x in (points.latents, points.lower, points.prompt.guidance):
        chosen, rejected = x.unflatten(0, (3, 2)).unbind(1)
        assert torch.equal(chosen, rejected)
    scale = points.prompt.guidance[::2]
    assert ((scale >= 6) & (scale <= 16)).all()
    assert len(set(scale.tolist())) == 3


def test_draws_do_not_depend_on_the_batch(lcm: Make) -> None:
    module = dpo(lcm())
    pairs = module.form_pairs(image_pairs())
    last = pairs._replace(
        latents=pairs.latents[2:],
        prompt=pairs.prompt.rows(slice(2, None)),
        seeds=pairs.seeds[2:],
    )
    together, alone = module.log_ratios(pairs), module.log_ratios(last)
    torch.testing.assert_close(alone.policy_error, together.policy_error[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [{}, {"lora": LoRA(4)}], ids=["full", "lora"])
def test_it_raises_the_margin_and_moves_nothing_else(way: dict[str, object], lcm: Make) -> None:
    module = dpo(lcm(**way), beta=20.0).train()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()
    ratios = module.log_ratios(module.form_pairs(image_pairs()))
    assert (ratios.chosen - ratios.rejected).mean() > 0
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    after = module.state_dict()
    assert any(name.startswith("backbone.teacher") for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_distillation_makes_answers_agree(precision: torch.dtype | None, tiny_folder: str) -> None:
    """Gradients reach all that is trained, under autocast as well, and the distance falls."""
    student = LatentConsistency(
        tiny_folder, teacher=tiny_folder, guidance_width=16, reference="none"
    )
    module = ConsistencyDistillation(student, AdamW(1e-3), w=(0.5, 2.0)).train()
    assert module.form_pairs(image_pairs()).sides == 1
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = loss_of(module)
        loss.backward()
        assert all(p.grad is not None for p in student.policy.parameters())
        assert student.policy.denoiser.conv_in.weight.grad.abs().sum() > 0
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]


def test_distillation_moves_the_noisier_answer_alone(lcm: Make) -> None:
    """The target has no gradient, and is the student's own."""
    module = ConsistencyDistillation(lcm(reference="none"), AdamW(1e-3)).train()
    pairs = module.form_pairs(image_pairs())
    points = consistency_points(module.backbone, pairs, module.w)
    with torch.no_grad():
        target = points.lower_prediction(module.backbone)
    error = points.error(points.upper_prediction(module.backbone), target, 0.001)
    error.mean().backward()
    expected = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    loss_of(module).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name
    module.eval()
    assert module.log_ratios(module.form_pairs(image_pairs())).values.shape == (3, 2)


def test_what_does_not_go_together_is_refused(
    lcm: Make, tiny_lcm_folder: str, backbone: StableDiffusion
) -> None:
    for method in (dpo, lambda b: ConsistencyDistillation(b, AdamW(1e-3))):
        with pytest.raises(InputError, match="StableDiffusion is none"):
            method(backbone)
        with pytest.raises(InputError, match="--backbone.teacher"):
            method(LatentConsistency(tiny_lcm_folder))
    with pytest.raises(InputError, match="--backbone.reference initial"):
        dpo(lcm(reference="none"))
    for w in ((-1.0, 2.0), (3.0, 2.0), (0.0, math.nan)):
        with pytest.raises(InputError, match="give a number"):
            dpo(lcm(), w=w)
    with pytest.raises(InputError, match="delta is 0"):
        dpo(lcm(), delta=0.0)
    with pytest.raises(InputError, match="reverse steps of a consistency model have no density"):
        Rollout(lcm(), Sampling(steps=4, eta=1.0))
    other = DiffusionDPO(lcm(), AdamW(1e-3), beta=5000.0)
    with pytest.raises(InputError, match="no denoising error"):
        loss_of(other)


def test_a_teacher_needs_a_guidance_scale(lcm: Make) -> None:
    backbone = lcm()
    prompt = backbone.embed(["a cat"])
    t = torch.tensor([999])
    with pytest.raises(InputError, match="guidance scale per prompt: give it as"):
        backbone.teacher_step(torch.zeros(1, 4, 8, 8), t, t - 20, prompt)
