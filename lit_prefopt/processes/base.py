"""Interface of a noise process: noising, training target, reverse steps, sampler."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_prefopt.processes.samplers import Sampler
from lit_prefopt.processes.settings import Sampling

Reading = Literal["noise", "velocity", "image"]
"""What a prediction is read as: the noise, the velocity, or the clean latents."""


class ReverseStep(NamedTuple):
    """A stochastic reverse step: a Gaussian over the next, less noisy latents."""

    mean: Tensor  # (B, C, H, W) float32
    sigma: Tensor  # (B, 1, 1, 1) float32
    clean: Tensor  # (B, C, H, W) float32: predicted clean latents

    def sample(self, noise: Tensor) -> Tensor:
        """Return the next latents for this noise, (B, C, H, W)."""
        return self.mean + self.sigma * noise

    def logp(self, latents: Tensor) -> Tensor:
        """Return the log-density of the next latents, in float32.

        It is a mean over C, H and W, not a sum, as in all published code.

        Args:
            latents: (B, C, H, W).

        Returns:
            One value per row, (B,).
        """
        z = (latents.float() - self.mean) / self.sigma
        logs = -0.5 * z.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)
        return logs.mean((1, 2, 3))

    def divergence(self, mean: Tensor) -> Tensor:
        """Return the KL divergence to a step with another mean and the same deviation, float32.

        It is exact, and a mean over C, H and W as `logp`.

        Args:
            mean: (B, C, H, W).

        Returns:
            One value per row, (B,).
        """
        return 0.5 * ((self.mean - mean.float()) / self.sigma).square().mean((1, 2, 3))


class Process(nn.Module, ABC):
    """Noise process of a denoiser: what a noise level is, how it is drawn, and what it does.

    A noise level `t` is what the process defines it to be, one number per row, (B,): an int64
    timestep of discrete diffusion, the float64 share of noise of a rectified flow. Methods pass it
    on and compute nothing with it; the backbone turns it into the time that the network takes.
    """

    PREDICTIONS: ClassVar[tuple[str, ...]]
    """Prediction types that can be trained."""

    HAS_TARGETS: ClassVar[bool] = True
    """Whether the denoiser has a target for noised latents."""

    HAS_DENSITIES: ClassVar[bool] = True
    """Whether a sampler's steps have a log-density, as on-policy methods need."""

    WRONG_TIMES: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = {}
    """Levels in whose place a network of another time convention would be given t, by their name,
    to recognise such a network."""

    prediction: str
    """Prediction type of the denoiser."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings of noise levels, noising and target by name."""

    # Noise levels -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of timesteps, on whose scale step-aware judges take noise levels."""

    @abstractmethod
    def draw_levels(self, u: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return the noise levels at quantiles u of their distribution in training, (B,).

        Args:
            u: Quantiles in [0, 1), (B,) float64; 0 is clean.
            shape: (C, H, W) of the latents, on which the distribution may depend.
        """

    @abstractmethod
    def quantile(self, t: Tensor) -> Tensor:
        """Return the place of noise levels among all of the schedule, in [0, 1), float64.

        It is 0 for clean latents; held-out means are logged by quarter of it.

        Args:
            t: Noise levels, of any shape.
        """

    @abstractmethod
    def level_at(self, share: float) -> Tensor:
        """Return the noise level whose share of the signal's variance is nearest to `share`, ()."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return noise levels as timesteps from 0 to `steps` - 1, int64, for step-aware judges.

        Args:
            t: Noise levels, of any shape.
        """

    @abstractmethod
    def level(self, timestep: Tensor) -> Tensor:
        """Return the noise levels of timesteps, the inverse of `timestep`.

        Args:
            timestep: From 0 to `steps` - 1, int64, of any shape.
        """

    # Noising and training target ----------------------------------------------------------------

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noised latents, (B, C, H, W).

        Args:
            latents: Clean latents, (B, C, H, W).
            noise: (B, C, H, W).
            t: Noise levels, (B,).
        """

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of latents and of noise in noised latents, each (B, 1, 1, 1) float64.

        Args:
            t: Noise levels, (B,).
        """
        ones = torch.ones(len(t), 1, 1, 1, dtype=torch.float64, device=t.device)
        zeros = torch.zeros_like(ones)
        return self.add_noise(ones, zeros, t), self.add_noise(zeros, ones, t)

    def part_of(self, t: Tensor, share: float) -> Tensor:
        """Return the noise levels at a share of the way from the clean level to t, (B,).

        Args:
            t: Noise levels, (B,), counted from 0, the clean level.
            share: In [0, 1].
        """
        return (t.double() * share).to(t.dtype)

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the denoiser, (B, C, H, W), for arguments as in `add_noise`.

        Raises:
            InputError: The process has no targets (`HAS_TARGETS`).
        """

    @abstractmethod
    def targets(self, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the targets of all prediction types by name, each (B, C, H, W).

        Those that cannot be trained are among them, to recognise a network that predicts one.
        """

    @abstractmethod
    def error_weight(self, t: Tensor, of: Reading) -> Tensor:
        """Return the factor that turns the denoiser's squared error into that of another reading.

        A prediction, with the noised latents, is also one of the noise, of the velocity and of the
        clean latents; their errors differ by a factor that depends on the level alone.

        Args:
            t: Noise levels, (B,).
            of: The other reading.

        Returns:
            Factors, (B,) float32.
        """

    # Reverse steps ------------------------------------------------------------------------------

    @abstractmethod
    def clean(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean latents, (B, C, H, W) float32.

        Args:
            prediction: Prediction of the denoiser at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: Noise levels, (B,).
        """

    @abstractmethod
    def noise(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise, (B, C, H, W) float32, for arguments as in `clean`."""

    @abstractmethod
    def step(
        self, prediction: Tensor, latents: Tensor, t: Tensor, t_next: Tensor, how: Sampling
    ) -> ReverseStep:
        """Return the stochastic reverse step from t to t_next.

        Args:
            prediction: Prediction of the denoiser at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: Noise levels, (B,).
            t_next: Less noisy ones, (B,).
            how: Settings with the step's `eta`, above 0 for a density.
        """

    @abstractmethod
    def sampler(self, how: Sampling, shape: tuple[int, int, int]) -> Sampler:
        """Return a new sampler.

        Args:
            how: Number of steps and eta.
            shape: (C, H, W) of the latents, on which the levels may depend.
        """
