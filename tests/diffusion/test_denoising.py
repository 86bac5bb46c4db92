from __future__ import annotations

import pytest
import torch

from lit_prefopt.batches import Pairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion.denoising import NoisedPairs, denoising_errors, error_log_ratios
from lit_prefopt.errors import InputError
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.settings import Sampling
from tests.helpers.schedules import SD15, alphas


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_target(prediction: str) -> None:
    process = DiscreteProcess({**SD15, "prediction_type": prediction})
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    a = alphas()[t].sqrt().float().view(-1, 1, 1, 1)
    s = (1 - alphas()[t]).sqrt().float().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        process.add_noise(latents, noise, t), a * latents + s * noise, atol=1e-5, rtol=1e-5
    )
    target = noise if prediction == "epsilon" else a * noise - s * latents
    torch.testing.assert_close(process.target(latents, noise, t), target, atol=1e-5, rtol=1e-5)


def test_latents_are_never_clipped_whatever_sampler_the_checkpoint_names() -> None:
    """Euler's configuration has no `clip_sample`, and DDIM's default would clip to one."""
    config = {**SD15, "prediction_type": "epsilon", "_class_name": "EulerDiscreteScheduler"}
    del config["clip_sample"]
    sampler = DiscreteProcess(config).sampler(Sampling(steps=20), (4, 8, 8))
    assert sampler.scheduler.config.clip_sample is False
    assert sampler.levels.tolist() == [*range(951, 0, -50), 0]


def test_other_predictions_are_refused() -> None:
    with pytest.raises(InputError, match="prediction_type 'sample'"):
        DiscreteProcess({**SD15, "prediction_type": "sample"})


def test_all_sides_share_timestep_and_noise() -> None:
    process = DiscreteProcess({**SD15, "prediction_type": "epsilon"})
    latents = torch.randn(3, 1, 4, 2, 2).expand(3, 2, 4, 2, 2)
    pairs = Pairs(
        latents, Prompt({"hidden": torch.randn(3, 5, 7)}), torch.arange(3), *torch.ones(2, 3)
    )
    noised = NoisedPairs.from_pairs(
        process, pairs, torch.tensor([7, 300, 999]), torch.randn(3, 4, 2, 2)
    )
    chosen, rejected = noised.latents.unflatten(0, (3, 2)).unbind(1)
    assert torch.equal(chosen, rejected)
    assert torch.equal(noised.target[:, 0], noised.target[:, 1])
    assert noised.t_per_side.tolist() == [7, 7, 300, 300, 999, 999]
    assert torch.equal(noised.prompt["hidden"][0], noised.prompt["hidden"][1])


def test_errors_are_means_in_float32() -> None:
    prediction = torch.zeros(2, 2, 4, 3, 3, dtype=torch.bfloat16)
    target = torch.zeros(2, 2, 4, 3, 3)
    target[:, 1] = 2.0
    errors = denoising_errors(prediction, target)
    assert errors.value.dtype == torch.float32
    assert errors.value.tolist() == [[0, 4], [0, 4]]
    assert errors.overlap.tolist() == [[0, 0], [0, 0]]


def test_a_mask_restricts_the_mean() -> None:
    target = torch.zeros(1, 2, 4, 2, 2)
    target[..., 0, 0] = 3.0
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0, 0] = 1
    errors = denoising_errors(torch.zeros_like(target), target, mask)
    torch.testing.assert_close(errors.value, torch.full((1, 2), 9.0))
    whole = denoising_errors(torch.zeros_like(target), target, torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(whole.value, torch.full((1, 2), 9.0 / 4))


def test_log_ratio_is_half_the_drop_in_error() -> None:
    policy, reference = torch.tensor([[0.1, 0.5]]), torch.tensor([[0.3, 0.4]])
    torch.testing.assert_close(error_log_ratios(policy, reference), torch.tensor([[0.1, -0.05]]))
    torch.testing.assert_close(error_log_ratios(policy, None), torch.tensor([[-0.05, -0.25]]))
