"""Samplers: what the next latents are, once the network has spoken."""

from __future__ import annotations

from abc import ABC, abstractmethod

from diffusers import DDIMScheduler
from torch import Tensor

from lit_prefopt.processes.settings import Sampling


class Sampler(ABC):
    """One walk from noise to clean latents; what is random about it is handed in.

    Args:
        timesteps: Before each step, noisiest first, (steps,) int64.
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps

    @abstractmethod
    def draws_noise(self, number: int) -> bool:
        """Whether step `number` adds noise."""

    @abstractmethod
    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W).

        Args:
            prediction: What the denoiser said of the latents, (B, C, H, W) float32.
            latents: (B, C, H, W).
            number: Which step; 0 is the noisiest.
            noise: (B, C, H, W) where the step adds any.
        """


class DDIM(Sampler):
    """DDIM (arXiv 2010.02502), deterministic with eta 0: diffusers' own scheduler.

    Args:
        scheduler: Fresh, and this walk's alone.
        how: Number of steps and eta.
    """

    def __init__(self, scheduler: DDIMScheduler, how: Sampling) -> None:
        scheduler.set_timesteps(how.steps)
        super().__init__(scheduler.timesteps)
        self.scheduler, self.eta = scheduler, how.eta

    def draws_noise(self, number: int) -> bool:
        """Whether eta is above zero."""
        return self.eta > 0

    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W)."""
        return self.scheduler.step(
            prediction, self.timesteps[number], latents, eta=self.eta, variance_noise=noise
        ).prev_sample
