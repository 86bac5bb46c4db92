"""Sampling settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lit_prefopt.errors import check_number

Draw = Literal["uniform", "logit-normal", "shifted", "logit-normal-shifted", "schedule"]
"""Distribution of the noise levels of a flow."""


@dataclass
class Sampling:
    """Settings of image sampling; two models are compared with the same settings and seeds.

    Args:
        steps: Number of denoising steps: of DDIM, of an LCM's multistep sampler, of a flow's Euler
            sampler.
        guidance: Classifier-free guidance scale; 1 is without.
        eta: Noise that each step adds; 0 is deterministic (DDIM, Euler). Share of DDPM's noise, or
            the factor of a flow's `stochastic` form. Not used by an LCM's sampler, which adds new
            noise between its steps.
        batch_size: Images sampled at a time.
        height: Height of the images in pixels; the checkpoint's native height if not given.
        width: Width of the images in pixels; the checkpoint's native width if not given.
        stochastic: Form of a flow's steps with eta above 0: `flow` (Flow-GRPO, usually eta 0.7),
            `dance` (DanceGRPO, 0.3) or `cps` (coefficients preserved, eta up to 1). Diffusion
            models do not use it.
        guided: Share of the steps, from the first, that are guided; the others take one forward
            without guidance. 1 is all of them.
    """

    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None
    stochastic: Literal["flow", "dance", "cps"] = "flow"
    guided: float = 1.0

    def __post_init__(self) -> None:
        """Check the range of all numbers."""
        check_number("steps", self.steps, 1)
        check_number("guidance", self.guidance)
        check_number("eta", self.eta, 0, 1 if self.stochastic == "cps" else math.inf)
        check_number("batch_size", self.batch_size, 1)
        check_number("height", self.height, 1, optional=True)
        check_number("width", self.width, 1, optional=True)
        check_number("guided", self.guided, 0, 1)

    def guides(self, number: int) -> bool:
        """Whether a step is guided.

        Args:
            number: Number of the step; 0 is the noisiest.
        """
        return (number + 1) / self.steps <= self.guided


@dataclass
class LevelDraw:
    """Distribution of a flow's noise levels in training.

    Args:
        draw: `uniform` in sigma, the share of noise; `logit-normal`; both with the checkpoint's own
            shift towards noise as `shifted` and `logit-normal-shifted`; or `schedule`, uniform over
            the 1000 levels of the checkpoint's scheduler.
        mean: Mean of the logit of sigma, before a shift, of the logit-normal draws.
        deviation: Its standard deviation.
    """

    draw: Draw = "logit-normal-shifted"
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        """Check the range of all numbers."""
        check_number("mean", self.mean)
        check_number("deviation", self.deviation, above=0)
