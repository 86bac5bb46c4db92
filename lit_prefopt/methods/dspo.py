"""DSPO: direct score preference optimisation of diffusion models (ICLR 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.denoising import denoising_errors, error_log_ratios, predict_sides
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons
from lit_prefopt.pairwise import PairwiseModule


class DSPO(PairwiseModule):
    """Matches the chosen side's score, corrected towards a score that prefers it.

    With r the residual of the policy on the chosen side, q that of the reference, z Diffusion-DPO's
    margin and k = beta (1 - sigmoid(z)), the loss is the mean of (r - k (r - q))^2 over channels
    and pixels: this is the loss that the released code has for Stable Diffusion 1.5, and that the
    paper derives. Its code for SDXL minimises another function, without a denoising error; it is
    not built here. As beta goes to 0, the loss is supervised fine-tuning's. It is defined on
    denoising errors, those of flow models as well.

    Args:
        beta: Strength of the correction, and of the margin z: released with 0.001, of 0.001, 0.01
            and 0.05, so that z is nearly 0.
    """

    takes_reference_errors = False

    def __init__(self, *args: Any, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        self.beta = beta

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to reference for each side, and the policy's drift."""
        noised = self.add_noise(pairs)
        with self.backbone.as_reference():
            kept = predict_sides(self.backbone, noised)
        own = predict_sides(self.backbone, noised)
        policy = denoising_errors(own, noised.target, noised.masks)
        reference = denoising_errors(kept, noised.target, noised.masks).value
        drift = denoising_errors(own, kept, noised.masks).value
        values = error_log_ratios(policy.value, reference)
        return self.weighted(
            LogRatios(values, noised.t, policy.value, reference, policy.overlap, drift)
        )

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the mean of (r - k (r - q))^2, in expectation over which side is better, (B,)."""
        stated, opposite = self._loss(ratios, 0, -1), self._loss(ratios, -1, 0)
        return pairs.labels * stated + (1 - pairs.labels) * opposite

    def _loss(self, ratios: LogRatios, better: int, worse: int) -> Tensor:
        """Return the loss from means of r^2, q^2 and (r - q)^2, which give that of r q."""
        policy = ratios.require("policy_error", "DSPO")[:, better]
        reference = ratios.require("reference_error", "DSPO")[:, better]
        drift = ratios.require("drift", "DSPO")[:, better]
        difference = ratios.values[:, better] - ratios.values[:, worse]
        k = self.beta * torch.sigmoid(-self.beta * difference)
        return (1 - k) * policy + k * reference - k * (1 - k) * drift
