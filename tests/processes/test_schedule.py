"""Noise schedules of other programs' schedulers: as their own classes compute them, or refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from lit_prefopt.errors import InputError
from lit_prefopt.processes.consistency import ConsistencyProcess
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.schedule import DDPM_SCHEDULERS, noise_schedule, restate_scheduler
from lit_prefopt.processes.settings import Sampling
from tests.helpers.schedules import SD15, alphas

NEEDS_MORE = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}  # torchsde and scipy
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("name", sorted(DDPM_SCHEDULERS - NEEDS_MORE))
def test_levels_are_those_of_the_class_itself(name: str) -> None:
    """With no field at all too: LCM's and TCD's defaults are not DDPM's."""
    kind = getattr(diffusers, name)
    bare = noise_schedule({"_class_name": name})
    torch.testing.assert_close(bare.alphas_cumprod, kind().alphas_cumprod)
    ours = noise_schedule({**SD15, "_class_name": name})
    torch.testing.assert_close(ours.alphas_cumprod.double(), alphas(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(NEEDS_MORE))
def test_no_package_of_a_sampler_is_needed(name: str) -> None:
    ours = noise_schedule({**SD15, "_class_name": name})
    torch.testing.assert_close(ours.alphas_cumprod.double(), alphas(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "CogVideoXDDIMScheduler"),
        *("DDPMWuerstchenScheduler", "SCMScheduler", "AScheduler" * 99),
    ],
)
def test_an_unknown_class_is_refused_by_its_name(name: str) -> None:
    for process in (DiscreteProcess, ConsistencyProcess):
        with pytest.raises(InputError, match=f"is a {name[:40]}") as refused:
            process({**SD15, "_class_name": name})
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "sigma_data", 0.5),
        ("DDIMScheduler", "snr_shift_scale", 3.0),
    ],
)
def test_a_known_class_with_another_process_is_refused(name: str, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"has {field} .*is not DDPM's"):
        DiscreteProcess({**SD15, "_class_name": name, field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "exp"}, "cannot be computed"),
        ({"num_train_timesteps": "many"}, "cannot be computed"),
        ({"beta_start": -0.1, "beta_end": -0.2, "beta_schedule": "linear"}, "do not fall"),
        ({"trained_betas": [0.1, 2.0]}, "do not fall"),
        ({"trained_betas": [float("nan")] * 1000}, "do not fall"),
    ],
)
def test_levels_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiscreteProcess({**SD15, **changes})


def test_zero_terminal_snr_is_that_of_the_paper() -> None:
    """Square roots of the levels are shifted and scaled: the last to 0, the first kept."""
    root = alphas().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    for process in (
        DiscreteProcess({**SD15, **ZERO}),
        DiscreteProcess(SD15, "v_prediction", zero_terminal_snr=True),
    ):
        assert process.zero_terminal_snr
        ours = process.scheduler.alphas_cumprod.double()
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    trailing = DiscreteProcess({**SD15, **ZERO, "timestep_spacing": "trailing"})
    sampler = trailing.sampler(Sampling(steps=4), (4, 8, 8))
    assert sampler.levels[0] == 999  # the level of pure noise itself
    v, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    there = (1 - expected[749]).sqrt() * noise - expected[749].sqrt() * v
    torch.testing.assert_close(sampler.step(v, noise, 0, None), there.float(), atol=1e-4, rtol=1e-4)
    undone = DiscreteProcess({**SD15, **ZERO}, zero_terminal_snr=False)
    assert not undone.zero_terminal_snr


def test_pure_noise_tells_epsilon_nothing() -> None:
    with pytest.raises(InputError, match=r"--backbone.prediction v_prediction.*_snr false"):
        DiscreteProcess({**SD15, "rescale_betas_zero_snr": True})
    cosine = DiscreteProcess({"beta_schedule": "squaredcos_cap_v2"})  # almost, but not zero
    assert not cosine.zero_terminal_snr


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_restated_scheduler_computes_what_it_states(name: str) -> None:
    """PNDM has no zero terminal SNR, and would keep the field without a use."""
    changed = restate_scheduler(getattr(diffusers, name)(), ZERO)
    assert changed.alphas_cumprod[-1] < 1e-6
    assert changed.config.prediction_type == "v_prediction"
    assert changed.config.rescale_betas_zero_snr
