"""Latent consistency models (LCM, arXiv 2310.04378): from any noise level to the clean end at once.

A consistency function says of any two points on one path of the reverse process the same clean
latents. It is made of the denoiser's view of them and, near the clean end, of the point itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import LCMScheduler
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.samplers import Sampler
from lit_prefopt.processes.settings import Sampling

SIGMA_DATA = 0.5
"""Deviation of the data that the boundary scalings assume, for every LCM."""


def boundary(t: Tensor, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out, the shares of the point itself and of what the denoiser sees.

    At t = 0 they are 1 and 0, so that a clean point is its own answer.

    Args:
        t: Timesteps, of any shape.
        scaling: How fast the point itself loses its share; all published LCMs have 10.

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
        delta: Difference at which the square becomes a distance.
    """
    difference = prediction.float() - target.float()
    return ((difference.square() + delta**2).sqrt() - delta).mean((-3, -2, -1))


class ConsistencyProcess(DiscreteProcess):
    """The process of an LCM: that of the model it was distilled from, walked in few steps.

    Args:
        config: The checkpoint's scheduler configuration. Of an LCM's own it knows
            `original_inference_steps`, the number of DDIM steps in which it was distilled (50
            where it is not said), and `timestep_scaling` (10).
        prediction: What the denoiser predicts, where the configuration says it wrongly.
    """

    HAS_DENSITIES: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], prediction: str | None = None) -> None:
        super().__init__(config, prediction)
        self.levels = int(config.get("original_inference_steps") or 50)
        """Number of noise levels at which it was distilled."""
        self.scaling = float(config.get("timestep_scaling") or 10.0)

    def draw_levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return a timestep of the distillation and the next cleaner one, both (B,) int64.

        Of 50 levels these are 20 (n + 1) - 1 and 20 less, where the cleanest ends at 0.

        Args:
            u: Uniform draws in [0, 1), (B,) float64: they choose n among 0 to 49.
        """
        apart = self.steps // self.levels
        t = apart * ((u * self.levels).long() + 1) - 1
        return t, (t - apart).clamp(min=0)

    def consistent(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the consistency function, (B, C, H, W) float32.

        Args:
            prediction: What the denoiser said at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: (B,) int64.
        """
        shares = boundary(t, self.scaling)
        skip, out = (share.float().view(-1, 1, 1, 1) for share in shares)
        return skip * latents.float() + out * self.clean(prediction, latents, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Refuse: a consistency model is no denoiser.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "A consistency model has no denoising error to learn from or to compare: take a method "
            "that is made for it, such as ConsistencyDPO, or another backbone."
        )

    def sampler(self, how: Sampling) -> Sampler:
        """Return a fresh walk of this model."""
        return Multistep(self, how)


class Multistep(Sampler):
    """The sampling of LCMs: to the clean end at once, and from there back to a cleaner level.

    Each step but the last adds fresh noise; eta plays no part.

    Args:
        process: The LCM's.
        how: Number of steps.

    Raises:
        InputError: More steps than the levels at which it was distilled.
    """

    def __init__(self, process: ConsistencyProcess, how: Sampling) -> None:
        if how.steps > process.levels:
            raise InputError(
                f"{how.steps} sampling steps are more than the {process.levels} levels of this "
                "consistency model: set `steps` of the sampling lower, as a rule to 4."
            )
        stock = LCMScheduler(
            num_train_timesteps=process.steps, original_inference_steps=process.levels
        )
        stock.set_timesteps(how.steps)
        super().__init__(stock.timesteps)
        self.process = process

    def draws_noise(self, number: int) -> bool:
        """Whether another step follows."""
        return number + 1 < len(self.timesteps)

    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W) float32."""
        clean = self.process.consistent(prediction, latents, self._at(number, latents))
        if not self.draws_noise(number):
            return clean
        assert noise is not None
        return self.process.add_noise(clean, noise, self._at(number + 1, latents))

    def _at(self, number: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), int(self.timesteps[number]), device=latents.device)
