"""Stochastic steps of a flow: exact marginals of a Gaussian, the Euler limit, log-densities."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.processes.flow_steps import LAST
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import Sampling

MEAN, VARIANCE = 0.7, 0.6
"""Of the data; its elements are independent, so that no denoiser predicts them better."""

SHAPE = 4, 64, 64

FORMS = [
    *(("flow", eta) for eta in (0.3, 0.7)),
    *(("dance", eta) for eta in (0.1, 0.3, 1.0)),
    *(("cps", eta) for eta in (0.3, 0.7, 1.0)),
]


def marginal(sigma: float, variance: float) -> tuple[float, float]:
    """Return mean and variance of noised data."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * variance + sigma**2


def velocity(x: Tensor, sigma: float, variance: float) -> Tensor:
    """Return the exact velocity, the mean of noise - data where the noised data are x."""
    mean, total = marginal(sigma, variance)
    return -MEAN + (sigma - (1 - sigma) * variance) / total * (x - mean)


def levels_of(steps: int, shift: float, start: float = 1.0) -> list[float]:
    how = Sampling(steps=steps)
    return (start * RectifiedFlow({"shift": shift}).sampler(how, SHAPE).levels).tolist()


def step(x: Tensor, here: float, there: float, how: Sampling, variance: float) -> Any:
    t, t_next = (torch.full((len(x),), level, dtype=torch.float64) for level in (here, there))
    return RectifiedFlow({}).step(velocity(x, here, variance), x, t, t_next, how)


def biases(levels: list[float], how: Sampling, variance: float) -> list[tuple[float, float]]:
    """Return how far mean and variance are from the marginal's after each step, without sampling.

    A step is a linear map and a deviation, which two points give.
    """
    mean, total = marginal(levels[0], variance)
    found = []
    for here, there in pairwise(levels):
        points = step(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), here, there, how, variance)
        zero, one = points.mean.flatten().double().tolist()
        mean, total = zero + (one - zero) * mean, (one - zero) ** 2 * total
        total += points.sigma[0].item() ** 2
        right = marginal(there, variance)
        found.append((mean - right[0], total - right[1]))
    return found


def worst(found: list[tuple[float, float]]) -> float:
    return max(abs(value) for both in found for value in both)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("form", "eta"), FORMS)
def test_samples_keep_mean_and_variance_at_every_level(form: Any, eta: float, shift: float) -> None:
    """`flow` from level 0.9 on and `cps` on point data; their other cases have their own tests."""
    how = Sampling(steps=200, eta=eta, stochastic=form)
    start, variance = (0.9 if form == "flow" else 1.0), (0.0 if form == "cps" else VARIANCE)
    levels = levels_of(how.steps, shift, start)
    mean, total = marginal(start, variance)
    random = torch.Generator().manual_seed(int(100 * eta + shift))
    x = mean + math.sqrt(total) * torch.randn(1, *SHAPE, generator=random)
    for here, there in pairwise(levels):
        noise = torch.randn(x.shape, generator=random)
        x = step(x, here, there, how, variance).sample(noise)
        mean, total = marginal(there, variance)
        count = x.numel()
        # five standard errors of a mean and of a variance, and what 200 steps leave
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(total / count) + 1e-4)
        assert x.var().item() == pytest.approx(total, abs=5 * total * math.sqrt(2 / count) + 0.014)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("form", "eta"), [x for x in FORMS if x[0] != "cps"])
def test_four_times_the_steps_have_a_fourth_of_the_error(
    form: Any, eta: float, shift: float
) -> None:
    start = 0.9 if form == "flow" else 1.0
    few, many = (
        worst(biases(levels_of(n, shift, start), Sampling(n, eta=eta, stochastic=form), VARIANCE))
        for n in (100, 400)
    )
    assert many < 0.3 * few
    assert many < 0.008


@pytest.mark.parametrize("steps", [28, 400])
def test_the_first_step_of_flow_grpo_adds_variance(steps: int) -> None:
    """From pure noise, by (eta^2 / 2)^2 and less, whatever the number of steps."""
    found = biases(levels_of(steps, 1.0), Sampling(steps, eta=0.7, stochastic="flow"), VARIANCE)
    level = 1 - 1 / steps
    by_hand = (level - 0.7**2 / 2) ** 2 + 0.7**2 - marginal(level, VARIANCE)[1]
    assert found[0][1] == pytest.approx(by_hand, abs=2e-3)  # the levels are not quite 1 - 1 / n
    assert 0.06 < found[0][1] < 0.09
    assert abs(found[-1][1]) < 0.01  # it is forgotten at the image


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_cps_keeps_the_marginals_of_point_data(steps: int, eta: float, shift: float) -> None:
    found = biases(levels_of(steps, shift), Sampling(steps, eta=eta, stochastic="cps"), 0.0)
    assert worst(found) < 2e-6


def test_cps_loses_variance_that_cannot_be_predicted() -> None:
    found = biases(levels_of(28, 1.0), Sampling(28, eta=0.7, stochastic="cps"), VARIANCE)
    assert found[-1][1] == pytest.approx(-0.2, abs=0.01)  # of 0.6
    small = biases(levels_of(28, 1.0), Sampling(28, eta=0.05, stochastic="cps"), VARIANCE)
    assert abs(small[-1][1]) < 0.06


@pytest.mark.parametrize("form", ["flow", "dance", "cps"])
def test_without_noise_it_is_the_euler_step(form: Any) -> None:
    x, v = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind(0)
    t, t_next = torch.tensor([[1.0, 0.6, 0.05], [0.9, 0.5, 0.0]], dtype=torch.float64)
    euler = x + (t_next.float() - t.float()).view(-1, 1, 1, 1) * v
    process = RectifiedFlow({})
    none = process.step(v, x, t, t_next, Sampling(eta=0.0, stochastic=form))
    close = {"atol": 1e-6, "rtol": 1e-6}
    if form == "cps":
        torch.testing.assert_close(none.mean, euler, **close)
    else:
        assert torch.equal(none.mean, euler)
    assert none.sigma.abs().max() == 0
    little = process.step(v, x, t, t_next, Sampling(eta=1e-4, stochastic=form))
    torch.testing.assert_close(little.mean, euler, **close)


def in_double(
    v: Tensor, x: Tensor, s: Tensor, r: Tensor, form: str, eta: float
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation by the formulas of the papers, in double precision."""
    if form == "flow":
        g = eta * (s / (1 - torch.where(s == 1, r, s))).sqrt()
        mean = x * (1 + g**2 * (r - s) / (2 * s))
        mean += v * (1 + g**2 * (1 - s) / (2 * s)) * (r - s)
        return mean, g * (s - r).sqrt()
    if form == "dance":
        score = -(x - (1 - s) * (x - s * v)) / s**2
        return x + (r - s) * (v - eta**2 / 2 * score), eta * (s - r).sqrt()
    new = math.sin(eta * math.pi / 2)
    mean = (1 - r) * (x - s * v) + (r**2 - (new * r) ** 2).clamp(min=0).sqrt() * (x + (1 - s) * v)
    return mean, new * r.clamp(min=LAST)


@pytest.mark.parametrize(("form", "eta"), FORMS)
def test_log_density_against_double_precision(form: Any, eta: float) -> None:
    random = torch.Generator().manual_seed(1)
    x, v, z = torch.randn(3, 4, *SHAPE, generator=random).double().unbind(0)
    t, t_next = torch.tensor([[1.0, 0.9, 0.4, 0.05], [0.93, 0.8, 0.3, 0.0]], dtype=torch.float64)
    wide = [level.view(-1, 1, 1, 1) for level in (t, t_next)]
    mean, deviation = in_double(v, x, *wide, form, eta)
    following = (mean + deviation * z).float()
    exact = torch.distributions.Normal(mean, deviation).log_prob(following.double())
    found = RectifiedFlow({}).step(
        v.float(), x.float(), t, t_next, Sampling(eta=eta, stochastic=form)
    )
    logp = found.logp(following)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact.mean((1, 2, 3)), atol=2e-4, rtol=2e-5)
    torch.testing.assert_close(found.clean, (x - wide[0] * v).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "eta"), FORMS)
def test_the_density_has_a_gradient_at_first_and_last_step(form: Any, eta: float) -> None:
    v = torch.randn(2, 4, 8, 8, requires_grad=True)
    x, following = torch.randn(2, 2, 4, 8, 8).unbind(0)
    t, t_next = torch.tensor([[1.0, 0.01], [0.96, 0.0]], dtype=torch.float64)
    how = Sampling(eta=eta, stochastic=form)
    RectifiedFlow({}).step(v, x, t, t_next, how).logp(following).sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert v.grad.abs().amax((1, 2, 3)).min() > 0


def test_a_stochastic_sampler_takes_these_steps() -> None:
    process, how = RectifiedFlow({"shift": 3.0}), Sampling(steps=4, eta=0.7)
    sampler = process.sampler(how, SHAPE)
    x, v, noise = torch.randn(3, 2, *SHAPE).unbind(0)
    for number, (t, t_next) in enumerate(pairwise(sampler.levels)):
        assert sampler.draws_noise(number)
        ours = process.step(v, x, t.expand(2), t_next.expand(2), how).sample(noise)
        assert torch.equal(sampler.step(v, x, number, noise), ours)
    with pytest.raises(InputError, match="Step 1 adds noise: pass it"):
        sampler.step(v, x, 1, None)


def test_cps_has_an_eta_of_at_most_one() -> None:
    with pytest.raises(InputError, match=r"eta is 1.1; give a number from 0 up to 1"):
        Sampling(eta=1.1, stochastic="cps")
