"""Reverse steps: against a table, against diffusers, against torch's normal distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.settings import Sampling

SHAPE = 4, 64, 64
DDPM = Sampling(eta=1.0)

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SIGMAS = [
    *(0.6444, 0.6241, 0.6029, 0.5807, 0.5576, 0.5336, 0.5087, 0.4829, 0.4565, 0.4293),
    *(0.4016, 0.3732, 0.3442, 0.3144, 0.2836, 0.2509, 0.2144, 0.1673, 0.0406, 0.0206),
]
"""The noise of each of 20 DDIM steps of SD 1.5 at eta 1, worked out from its betas alone."""


def process(prediction: str = "epsilon", **options: object) -> DiscreteProcess:
    return DiscreteProcess({**SD15, "prediction_type": prediction, **options})


def timesteps() -> Tensor:
    """Return the timesteps of 20 steps, and 0."""
    return process().sampler(Sampling(steps=20), SHAPE).levels


def test_timesteps_are_those_of_the_stock_pipeline() -> None:
    assert timesteps().tolist() == [*range(951, 0, -50), 0]


@pytest.mark.parametrize("final_level_is_one", [True, False])
def test_the_noise_of_twenty_steps(final_level_is_one: bool) -> None:
    """The last one too: diffusers gives it none where the final level is one."""
    t = timesteps()[:-1]
    zeros = torch.zeros(20, 4, 1, 1)
    step = process(set_alpha_to_one=final_level_is_one).step(zeros, zeros, t, t - 50, DDPM)
    assert step.sigma.flatten().tolist() == pytest.approx(SIGMAS, abs=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stepping_with_a_stored_noise_is_diffusers_step(prediction: str, eta: float) -> None:
    ours = process(prediction, set_alpha_to_one=False)
    theirs = ours.sampler(Sampling(steps=20), SHAPE).scheduler
    latents, said, noise = torch.randn(3, 2, 4, 8, 8).unbind(0)
    for t in theirs.timesteps:
        there = theirs.step(said, t, latents, eta=eta, variance_noise=noise)
        step = ours.step(said, latents, t.expand(2), t.expand(2) - 50, Sampling(eta=eta))
        torch.testing.assert_close(step.sample(noise), there.prev_sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(step.clean, there.pred_original_sample, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.clean(said, latents, t.expand(2)), step.clean)


def test_log_density_is_the_normal_distributions() -> None:
    latents, said, following = torch.randn(3, 5, 4, 8, 8).unbind(0)
    t = torch.tensor([951, 501, 101, 51, 1])
    step = process().step(said, latents, t, t - 50, DDPM)
    theirs = torch.distributions.Normal(step.mean, step.sigma).log_prob(following)
    assert torch.isfinite(step.logp(following)).all()
    torch.testing.assert_close(step.logp(following), theirs.mean((1, 2, 3)))


def test_rows_of_a_batch_have_timesteps_of_their_own() -> None:
    latents, said = torch.randn(2, 2, 4, 8, 8).unbind(0)
    t, t_next = torch.tensor([951, 51]), torch.tensor([901, 1])
    both = process().step(said, latents, t, t_next, DDPM)
    for row in range(2):
        alone = process().step(*(x[row : row + 1] for x in (said, latents, t, t_next)), DDPM)
        assert torch.equal(both.mean[row], alone.mean[0])
        assert torch.equal(both.sigma[row], alone.sigma[0])


def test_the_density_has_a_gradient() -> None:
    said = torch.randn(1, 4, 8, 8, requires_grad=True)
    latents, following = torch.randn(2, 1, 4, 8, 8).unbind(0)
    step = process().step(said, latents, torch.tensor([951]), torch.tensor([901]), DDPM)
    step.logp(following).sum().backward()
    assert said.grad is not None
    assert said.grad.abs().min() > 0
