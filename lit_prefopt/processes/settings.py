"""How images are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from lit_prefopt.errors import check_number


@dataclass
class Sampling:
    """How images are sampled; two models are compared under the same settings and seeds.

    Args:
        steps: Number of denoising steps: DDIM's, or an LCM's own multistep sampler's.
        guidance: Classifier-free guidance scale; 1 is without.
        eta: Share of DDPM's noise that each step adds; 0 is deterministic DDIM. An LCM's
            sampler, which adds fresh noise between its steps, has no use for it.
        batch_size: Images made at a time.
        height: Height of the images in pixels; the checkpoint's own where it is not given.
        width: Width of the images in pixels; the checkpoint's own where it is not given.
    """

    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no sampler can use."""
        check_number("steps", self.steps, 1)
        check_number("guidance", self.guidance)
        check_number("eta", self.eta, 0)
        check_number("batch_size", self.batch_size, 1)
        check_number("height", self.height, 1)
        check_number("width", self.width, 1)
