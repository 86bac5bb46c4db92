"""DDIM-InPO: preference optimisation with inverted noise (arXiv 2503.18454, 2025)."""

from __future__ import annotations

from typing import Any

from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion.denoising import NoisedPairs
from lit_prefopt.diffusion.inversion import Solver, invert
from lit_prefopt.errors import check_number
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class InPO(DiffusionDPO):
    """Diffusion-DPO at noise that the current policy inverts each image to.

    Each side is taken to its noise level by DDIM inversion with the policy, without guidance and
    gradient, in place of random noise; the loss is Diffusion-DPO's on the noise that results. A
    step of training takes `inversion_steps` further forwards. On a flow the inversion is Euler's,
    of its velocity.

    Args:
        inversion_steps: Steps from the image to its noise level. They are equal parts of the way,
            whereas the released code takes those of a fixed grid of 10 that lie below the level.
        inversion_eta: Random share of the noise of each step, in units of the deviation of DDPM's
            reverse step, in [0, 1]; 0 is deterministic.
    """

    SOLVER: Solver = "euler"
    """Noise of an inversion step."""

    takes_reference_errors = False

    def __init__(
        self, *args: Any, inversion_steps: int = 10, inversion_eta: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("inversion_steps", inversion_steps, 1)
        check_number("inversion_eta", inversion_eta, 0, 1)
        self.inversion_steps, self.inversion_eta = inversion_steps, inversion_eta

    def add_noise(self, pairs: Pairs) -> NoisedPairs:
        """Add to each side the noise that the policy inverts it to, at one level per pair."""
        noised = super().add_noise(pairs)
        noise = invert(
            self.backbone,
            pairs,
            noised.t,
            self.inversion_steps,
            self.SOLVER,
            self.inversion_eta,
        )
        masked = pairs._replace(masks=noised.masks)
        return NoisedPairs.from_pairs(self.backbone.process, masked, noised.t, noise)
