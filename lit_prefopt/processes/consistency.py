"""Noise process of latent consistency models (LCM, arXiv 2310.04378), with multistep sampling.

A consistency function maps all points on one path of the reverse process to the same clean latents.
It is a sum of the predicted clean latents and, near the clean end, of the point itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import LCMScheduler
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Reading
from lit_prefopt.processes.samplers import Sampler, with_clean
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.processes.variance_preserving import VariancePreserving

SIGMA_DATA = 0.5
"""Deviation of the data that the boundary scalings assume, for every LCM."""

NO_TARGETS = (
    "A consistency model has no denoising errors to train on or to compare: take a method for "
    "consistency models, such as ConsistencyDPO, or another backbone."
)


def boundary(t: Tensor, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out, the factors of the point itself and of the predicted latents.

    At t = 0 they are 1 and 0, so that a clean point is mapped to itself.

    Args:
        t: Timesteps, of any shape.
        scaling: Factor of the timesteps; all published LCMs have 10.

    Returns:
        Two float64 tensors of that shape.
    """
    scaled = t.double() * scaling
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def pseudo_huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Return the mean of sqrt(difference^2 + delta^2) - delta over C, H and W, float32.

    Args:
        prediction: (..., C, H, W).
        target: (..., C, H, W).
        delta: Difference at which the distance turns from square to absolute.
    """
    difference = prediction.float() - target.float()
    return ((difference.square() + delta**2).sqrt() - delta).mean((-3, -2, -1))


class ConsistencyProcess(VariancePreserving):
    """Noise process of an LCM: that of the model it was distilled from, sampled in few steps.

    Args:
        config: The checkpoint's scheduler configuration, with an LCM's `original_inference_steps`,
            the number of DDIM steps of its distillation (default 50), and `timestep_scaling`
            (default 10).
        prediction: Prediction type of the denoiser, if the configuration states a wrong one.
        zero_terminal_snr: Whether the last noise level is pure noise, if the configuration states
            it wrongly.
    """

    HAS_TARGETS: ClassVar[bool] = False

    HAS_DENSITIES: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.levels = int(config.get("original_inference_steps") or 50)
        """Number of noise levels of the distillation."""
        self.scaling = float(config.get("timestep_scaling") or 10.0)

    def adjacent_levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return a timestep of the distillation and the next cleaner one, both (B,) int64.

        With 50 levels they are 20 (n + 1) - 1 and 20 less, at least 0.

        Args:
            u: Uniform draws in [0, 1), (B,) float64, which choose n from 0 to 49.
        """
        apart = self.steps // self.levels
        t = apart * ((u * self.levels).long() + 1) - 1
        return t, (t - apart).clamp(min=0)

    def consistent(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the consistency function, (B, C, H, W) float32.

        Args:
            prediction: Prediction of the denoiser at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: (B,) int64.
        """
        shares = boundary(t, self.scaling)
        skip, out = (share.float().view(-1, 1, 1, 1) for share in shares)
        return skip * latents.float() + out * self.clean(prediction, latents, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Raise an error: a consistency model has no denoising target."""
        raise InputError(NO_TARGETS)

    def targets(self, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Raise an error: a consistency model has no denoising target."""
        raise InputError(NO_TARGETS)

    def error_weight(self, t: Tensor, of: Reading) -> Tensor:
        """Raise an error: a consistency model has no denoising errors."""
        raise InputError(NO_TARGETS)

    def sampler(self, how: Sampling, shape: tuple[int, int, int]) -> Sampler:
        """Return a new multistep sampler."""
        return Multistep(self, how)


class Multistep(Sampler):
    """Multistep sampler of LCMs: predict clean latents, then add noise of a cleaner level.

    Each step but the last adds new noise; eta is not used.

    Args:
        process: Noise process of the LCM.
        how: Number of steps.

    Raises:
        InputError: There are more steps than levels of the distillation.
    """

    def __init__(self, process: ConsistencyProcess, how: Sampling) -> None:
        if how.steps > process.levels:
            raise InputError(
                f"{how.steps} sampling steps are more than the {process.levels} levels of this "
                "consistency model: lower `steps` of the sampling, usually to 4."
            )
        stock = LCMScheduler(
            num_train_timesteps=process.steps, original_inference_steps=process.levels
        )
        stock.set_timesteps(how.steps)
        super().__init__(with_clean(stock.timesteps))
        self.process = process

    def draws_noise(self, number: int) -> bool:
        """Whether step `number` adds noise: all but the last do."""
        return number + 1 < self.steps

    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W) float32."""
        clean = self.process.consistent(prediction, latents, self._at(number, latents))
        if not self.draws_noise(number):
            return clean
        if noise is None:
            raise InputError(f"Step {number} adds noise: pass it, as `draws_noise` says.")
        return self.process.add_noise(clean, noise, self._at(number + 1, latents))

    def _at(self, number: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), int(self.levels[number]), device=latents.device)
