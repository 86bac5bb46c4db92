"""How images are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Sampling:
    """How images are sampled; two models are compared under the same settings and seeds.

    Args:
        steps: Number of denoising steps (DDIM).
        guidance: Classifier-free guidance scale; 1 is without.
        eta: Share of DDPM's noise that each step adds; 0 is deterministic DDIM.
        batch_size: Images made at a time.
    """

    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    batch_size: int = 16
