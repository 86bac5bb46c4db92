"""Discrete-time diffusion (DDPM): the denoiser's target and the DDIM sampler."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_prefopt.processes.base import Reading
from lit_prefopt.processes.samplers import DDIM, Sampler
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.processes.variance_preserving import VariancePreserving


class DiscreteProcess(VariancePreserving):
    """Discrete-time diffusion (DDPM) with a denoiser that predicts the noise or the velocity."""

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the denoiser, (B, C, H, W)."""
        if self.prediction == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        return noise

    def targets(self, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the targets of all prediction types by name, each (B, C, H, W).

        Those that cannot be trained are among them, to recognise a network that predicts one.
        """
        velocity = self.scheduler.get_velocity(latents, noise, t)
        return {"epsilon": noise, "v_prediction": velocity, "sample": latents}

    def error_weight(self, t: Tensor, of: Reading) -> Tensor:
        """Return the factor that turns the denoiser's squared error into that of another reading.

        With the share a of the signal's variance, the errors of noise, velocity and image are as
        a : 1 : 1 - a.
        """
        signal = self._signal(t)
        shares = {"noise": signal, "velocity": torch.ones_like(signal), "image": 1 - signal}
        own = shares["velocity" if self.prediction == "v_prediction" else "noise"]
        return (shares[of] / own).float()

    def sampler(self, how: Sampling, shape: tuple[int, int, int]) -> Sampler:
        """Return a new DDIM sampler of this process.

        Latents are not clipped and timesteps start at 1, as in the stock pipeline, whatever
        sampler the checkpoint was saved with.
        """
        config = self.scheduler.config
        return DDIM(DDIMScheduler.from_config(config, clip_sample=False, steps_offset=1), how)
