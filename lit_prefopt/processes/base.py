"""A stochastic reverse step with its log-density."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


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
