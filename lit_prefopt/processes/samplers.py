"""Samplers: compute the next latents from a prediction of the denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_prefopt.processes.settings import Sampling


class Sampler(ABC):
    """One sampling run from noise to clean latents; the caller provides all noise.

    Args:
        levels: Noise level before each step, noisiest first, and that after the last, (steps + 1,)
            in the process's dtype.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.levels) - 1

    @abstractmethod
    def draws_noise(self, number: int) -> bool:
        """Whether step `number` adds noise."""

    @abstractmethod
    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W).

        Args:
            prediction: Prediction of the denoiser for the latents, (B, C, H, W) float32.
            latents: (B, C, H, W).
            number: Number of the step; 0 is the noisiest.
            noise: (B, C, H, W), if the step adds noise.
        """


class DDIM(Sampler):
    """DDIM (arXiv 2010.02502), deterministic with eta 0: diffusers' own scheduler.

    Args:
        scheduler: A new scheduler, used by this sampler only.
        how: Number of steps and eta.
    """

    def __init__(self, scheduler: DDIMScheduler, how: Sampling) -> None:
        scheduler.set_timesteps(how.steps)
        super().__init__(with_clean(scheduler.timesteps))
        self.scheduler, self.eta = scheduler, how.eta

    def draws_noise(self, number: int) -> bool:
        """Whether step `number` adds noise: eta is above 0."""
        return self.eta > 0

    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W)."""
        return self.scheduler.step(
            prediction, self.levels[number], latents, eta=self.eta, variance_noise=noise
        ).prev_sample


def with_clean(levels: Tensor) -> Tensor:
    """Return levels (S,) followed by 0, the clean level, (S + 1,)."""
    return torch.cat([levels, levels.new_zeros(1)])
