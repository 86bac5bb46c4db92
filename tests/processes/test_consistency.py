"""Consistency functions: against diffusers' LCM scheduler, and formulas written out."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler

from lit_prefopt.errors import InputError
from lit_prefopt.processes.consistency import ConsistencyProcess, boundary, pseudo_huber
from lit_prefopt.processes.settings import Sampling
from tests.helpers.schedules import SD15, alphas

SHAPE = 4, 64, 64


def process(prediction: str = "epsilon", **changes: object) -> ConsistencyProcess:
    return ConsistencyProcess({**SD15, "prediction_type": prediction, **changes})


def test_a_clean_point_is_its_own_answer() -> None:
    skip, out = boundary(torch.tensor([0]))
    assert (skip.item(), out.item()) == (1, 0)
    latents, said = torch.randn(2, 2, 4, 8, 8).unbind(0)
    answer = process().consistent(said, latents, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(answer, latents)


def test_shares_are_those_of_lcms() -> None:
    stock = LCMScheduler()
    t = torch.tensor([1, 19, 500, 999])
    theirs = [stock.get_scalings_for_boundary_condition_discrete(int(x)) for x in t]
    for ours, expected in zip(boundary(t), zip(*theirs, strict=True), strict=True):
        assert ours.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_consistency_function_in_double_precision(prediction: str) -> None:
    latents, said = torch.randn(2, 3, 4, 8, 8).unbind(0)
    t = torch.tensor([0, 19, 999])
    a = alphas()[t].view(-1, 1, 1, 1)
    x, p = latents.double(), said.double()
    v = a.sqrt() * x - (1 - a).sqrt() * p
    clean = (x - (1 - a).sqrt() * p) / a.sqrt() if prediction == "epsilon" else v
    scaled = t.double().view(-1, 1, 1, 1) / 0.1
    expected = 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * clean
    answer = process(prediction).consistent(said, latents, t)
    torch.testing.assert_close(answer.double(), expected, atol=1e-4, rtol=1e-5)


def test_pseudo_huber_by_hand() -> None:
    """Square near zero, absolute far away, and never without a finite gradient."""
    target = torch.zeros(4, 1, 1, 2)
    values = torch.tensor([[0.0, 0.0], [3e-4, -4e-4], [2.0, -4.0], [100.0, -100.0]])
    answer = values.view(4, 1, 1, 2).requires_grad_()
    distance = pseudo_huber(answer, target, 1e-3)
    small = ((9e-8 + 1e-6) ** 0.5 + (16e-8 + 1e-6) ** 0.5) / 2 - 1e-3
    assert distance.tolist() == pytest.approx([0, small, 3 - 1e-3, 100 - 1e-3], rel=1e-4, abs=1e-9)
    distance.sum().backward()
    assert answer.grad.flatten().tolist()[:2] == [0, 0]
    assert answer.grad.flatten().tolist()[-2:] == pytest.approx([0.5, -0.5])
    assert pseudo_huber(answer.bfloat16(), target.bfloat16(), 1e-3).dtype == torch.float32


def test_levels_are_those_of_the_distillation() -> None:
    u = torch.tensor([0.0, 0.0199, 0.02, 0.5, 0.999999], dtype=torch.float64)
    t, lower = process().adjacent_levels(u)
    assert t.tolist() == [19, 19, 39, 519, 999]
    assert lower.tolist() == [0, 0, 19, 499, 979]
    t, lower = process(original_inference_steps=20).adjacent_levels(u)
    assert t.tolist() == [49, 49, 49, 549, 999]
    assert lower.tolist() == [0, 0, 0, 499, 949]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_timesteps_are_those_of_the_stock_scheduler(steps: int) -> None:
    stock = LCMScheduler()
    stock.set_timesteps(steps)
    assert process().sampler(Sampling(steps), SHAPE).levels.tolist() == [
        *stock.timesteps.tolist(),
        0,
    ]


def test_more_steps_than_levels_are_refused() -> None:
    with pytest.raises(InputError, match="51 sampling steps are more than the 50 levels"):
        process().sampler(Sampling(steps=51), SHAPE)


def test_a_consistency_model_has_no_denoising_error() -> None:
    latents = torch.zeros(1, 4, 2, 2)
    with pytest.raises(InputError, match="such as ConsistencyDPO"):
        process().target(latents, latents, torch.tensor([5]))
