"""Sampling settings."""

from __future__ import annotations

from dataclasses import dataclass

from lit_prefopt.errors import check_number


@dataclass
class Sampling:
    """Settings of image sampling; two models are compared with the same settings and seeds.

    Args:
        steps: Number of denoising steps, of DDIM or of an LCM's multistep sampler.
        guidance: Classifier-free guidance scale; 1 is without.
        eta: Share of DDPM's noise that each step adds; 0 is deterministic DDIM. Not used by an
            LCM's sampler, which adds new noise between its steps.
        batch_size: Images sampled at a time.
        height: Height of the images in pixels; the checkpoint's native height if not given.
        width: Width of the images in pixels; the checkpoint's native width if not given.
    """

    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Check the range of all numbers."""
        check_number("steps", self.steps, 1)
        check_number("guidance", self.guidance)
        check_number("eta", self.eta, 0)
        check_number("batch_size", self.batch_size, 1)
        check_number("height", self.height, 1)
        check_number("width", self.width, 1)
