"""Rectified flow: levels and steps of diffusers' scheduler, noising, targets, weights and draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Reading
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.flow_shift import linear_shift
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import LevelDraw, Sampling
from tests.helpers.schedules import SD15

SHAPE = 16, 128, 128  # of 1024 x 1024 pixels
U = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
FLUX: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_euler_steps_are_diffusers_to_the_last_bit(steps: int, shift: float) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    sampler = RectifiedFlow(dict(stock.config)).sampler(Sampling(steps=steps), SHAPE)
    assert sampler.steps == steps
    assert sampler.levels.dtype == torch.float64
    assert torch.equal(sampler.levels.float(), stock.sigmas)
    assert torch.equal((1000 * sampler.levels[:-1]).float(), stock.timesteps)
    random = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=random)
    for number, t in enumerate(stock.timesteps):
        prediction = torch.randn(2, 4, 8, 8, generator=random)
        assert not sampler.draws_noise(number)
        ours = sampler.step(prediction, ours, number, None)
        theirs = stock.step(prediction, t, theirs).prev_sample
        assert torch.equal(ours, theirs)


def test_levels_of_stable_diffusion_3() -> None:
    levels = RectifiedFlow({"shift": 3.0}).sampler(Sampling(steps=4), SHAPE).levels
    assert levels.tolist() == pytest.approx([1, 0.857692, 0.602151, 0.008929, 0], abs=1e-6)


def test_a_shift_by_resolution_is_the_stock_pipelines() -> None:
    process = RectifiedFlow(FLUX, mu=linear_shift, linear=True)
    levels = process.sampler(Sampling(steps=28), SHAPE).levels
    picked = [levels[1].item(), levels[14].item(), levels[-2].item()]
    assert picked == pytest.approx([0.98841, 0.75951, 0.10472], abs=1e-5)
    stock = FlowMatchEulerDiscreteScheduler(**FLUX)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28), mu=1.15)
    assert torch.equal(levels.float(), stock.sigmas)
    small = process.sampler(Sampling(steps=28), (16, 32, 32)).levels
    assert [small[1].item(), small[-2].item()] == pytest.approx([0.97803, 0.05755], abs=1e-5)
    assert process.shift(SHAPE) == pytest.approx(math.exp(1.15))
    shifted = RectifiedFlow(FLUX, LevelDraw("shifted"), linear_shift).draw_levels(U, SHAPE)
    assert shifted.median().item() == pytest.approx(math.exp(1.15) / (1 + math.exp(1.15)), abs=1e-3)


def test_steps_of_which_the_levels_are_not_finite_are_refused() -> None:
    process = RectifiedFlow(FLUX | {"shift_terminal": 0.02}, mu=linear_shift, linear=True)
    assert process.sampler(Sampling(steps=2), SHAPE).levels.isfinite().all()
    with pytest.raises(InputError, match="levels of 1 sampling steps are not finite"):
        process.sampler(Sampling(steps=1), SHAPE)


def test_noising_and_its_inverse() -> None:
    process = RectifiedFlow({"shift": 3.0})
    process.sampler(Sampling(steps=4), SHAPE).step(torch.ones(1, 1, 1, 1), torch.ones(1), 0, None)
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind(0)
    t = torch.tensor([0.1, 0.75, 1.0], dtype=torch.float64)
    wide = t.view(-1, 1, 1, 1)
    noised = process.add_noise(latents, noise, t)
    assert noised.dtype == torch.float32
    exact = (1 - wide) * latents.double() + wide * noise.double()
    torch.testing.assert_close(noised.double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(noised[2], noise[2])
    target = process.target(latents, noise, t)
    assert torch.equal(target, noise - latents)
    torch.testing.assert_close(process.clean(target, noised, t), latents, atol=1e-6, rtol=1e-5)
    targets = process.targets(latents, noise, t)
    assert [*targets] == ["velocity", "negative velocity", "epsilon", "sample"]
    assert torch.equal(targets["negative velocity"], latents - noise)


def readings(process: Any, prediction: Tensor, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return noise, velocity and image of a prediction, from the definitions alone."""
    if isinstance(process, RectifiedFlow):
        s = t.view(-1, 1, 1, 1)
        clean = x - s * prediction
        return {"noise": (x - (1 - s) * clean) / s, "velocity": prediction, "image": clean}
    a = process.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    if process.prediction == "epsilon":
        noise = prediction
    else:
        noise = a.sqrt() * prediction + (1 - a).sqrt() * x
    clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
    return {"noise": noise, "velocity": a.sqrt() * noise - (1 - a).sqrt() * clean, "image": clean}


@pytest.mark.parametrize("of", ["noise", "velocity", "image"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "velocity"])
def test_error_weights_against_direct_computation(prediction: str, of: Reading) -> None:
    """The weighted error of the denoiser is the error of its other reading."""
    process: Any
    if prediction == "velocity":
        process, t = RectifiedFlow({}), torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    else:
        process = DiscreteProcess({**SD15, "prediction_type": prediction})
        t = torch.tensor([10, 500, 980])
    random = torch.Generator().manual_seed(2)
    latents, noise, said = torch.randn(3, 3, 4, 8, 8, generator=random).double().unbind(0)
    x = process.add_noise(latents, noise, t)
    target = process.target(latents, noise, t)
    found, right = (readings(process, each, x, t)[of] for each in (said, target))
    direct = (found - right).square().mean((1, 2, 3))
    weighted = process.error_weight(t, of).double() * (said - target).square().mean((1, 2, 3))
    torch.testing.assert_close(weighted, direct, rtol=1e-5, atol=0)
    assert process.error_weight(t, of).dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("draw", ["uniform", "logit-normal", "shifted", "logit-normal-shifted"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.5, 1.4)])
def test_draws_against_their_distribution_functions(
    draw: Any, shift: float, mean: float, deviation: float
) -> None:
    process = RectifiedFlow({"shift": shift}, LevelDraw(draw, mean, deviation))
    t = process.draw_levels(U, SHAPE)
    assert t.dtype == torch.float64
    assert (t.diff() > 0).all()
    if draw.endswith("shifted"):
        t = t / (shift - (shift - 1) * t)  # undo the shift
    if draw.startswith("logit-normal"):
        z = (torch.log(t / (1 - t)) - mean) / deviation
        t = (1 + torch.erf(z / math.sqrt(2))) / 2  # the share of levels below
    torch.testing.assert_close(t, U, atol=1e-9, rtol=0)


def test_the_schedules_own_levels_are_drawn_equally_often() -> None:
    process = RectifiedFlow({"shift": 3.0}, LevelDraw("schedule"))
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)
    drawn = process.draw_levels(U, SHAPE)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.float(), table, atol=1e-6, rtol=0)
    assert process.draw_levels(U[-1:], SHAPE).item() == 1


@pytest.mark.parametrize("draw", ["uniform", "logit-normal", "shifted", "schedule"])
def test_the_ends_of_a_draw_are_levels(draw: Any) -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for t in RectifiedFlow({"shift": 3.0}, LevelDraw(draw)).draw_levels(ends, SHAPE).tolist():
        assert 0 < t <= 1


def test_places_in_the_schedule() -> None:
    process = RectifiedFlow({"shift": 3.0}, LevelDraw("shifted"))
    torch.testing.assert_close(process.quantile(process.draw_levels(U, SHAPE)), U)
    ends = process.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends[0] == 0
    assert 0.999 < ends[1] < 1


def test_timesteps_of_judges() -> None:
    process = RectifiedFlow({})
    t = torch.tensor([0.0, 0.0014, 0.5, 1.0], dtype=torch.float64)
    assert process.timestep(t).tolist() == [0, 1, 500, 999]
    whole = torch.arange(1000)
    assert torch.equal(process.timestep(process.level(whole)), whole)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_level_of_a_share_of_the_signal(share: float) -> None:
    sigma = RectifiedFlow({}).level_at(share).item()
    assert (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2) == pytest.approx(share)
    discrete = DiscreteProcess({**SD15, "prediction_type": "epsilon"})
    found = discrete.scheduler.alphas_cumprod[discrete.level_at(share)].item()
    assert found == pytest.approx(share, abs=2e-3)


def test_settings_tell_draws_apart() -> None:
    def settings(*draw: Any) -> dict[str, Any]:
        return RectifiedFlow({"shift": 3.0}, LevelDraw(*draw)).settings()

    assert settings("uniform", 1.0) == settings("uniform", 2.0)
    different = [settings(d) for d in ("uniform", "shifted", "logit-normal")]
    different += [settings("logit-normal", 1.0), RectifiedFlow({}, LevelDraw("uniform")).settings()]
    for number, one in enumerate(different):
        assert one not in different[:number]


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("nan")])
def test_a_deviation_is_above_zero(deviation: float) -> None:
    with pytest.raises(InputError, match="deviation is .*; give a number above 0"):
        LevelDraw("logit-normal", 0.0, deviation)
