"""MaPO: margin-aware preference optimisation without a reference (arXiv 2406.06424, 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons, bernoulli_function, preference_loss
from lit_prefopt.pairwise import PairwiseModule


class MaPO(PairwiseModule):
    """Fine-tunes on the chosen side and widens its margin over the rejected side's likelihood.

    The likelihood of a side is `scale` times x / (exp(x) - 1), with x its denoising error times
    `slope`. There is no reference, and no second network in memory. As `slope` goes to 0, with
    `scale` times `slope` fixed, the margin is Diffusion-DPO's without a reference, at a beta of
    that product. It is defined on denoising errors, those of flow models as well; held-out
    preference is computed against the reference if there is one.

    Args:
        weight: Weight of the margin's loss relative to the chosen side's error; `beta_mapo` of the
            released code.
        slope: Factor of the errors; `snr_value` of the released code.
        scale: Factor of the likelihoods in the margin: the number of timesteps in released code.
    """

    needs_reference = False

    def __init__(
        self,
        *args: Any,
        weight: float = 0.1,
        slope: float = 0.5,
        scale: float = 1000.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("weight", weight, 0)
        check_number("slope", slope, above=0)
        check_number("scale", scale, above=0)
        self.weight, self.slope, self.scale = weight, slope, scale

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the chosen side's error plus the weighted loss of the margin, (B,)."""
        chosen = ratios.require("policy_error", "MaPO")[:, 0]
        return chosen + self.weight * preference_loss(self.margin(ratios), pairs.labels, 1.0)

    def margin(self, ratios: LogRatios) -> Tensor:
        """Return the chosen side's scaled likelihood minus the rejected side's, (B,)."""
        errors = ratios.require("policy_error", "MaPO")
        likelihoods = self.scale * bernoulli_function(self.slope * errors)
        return likelihoods[:, 0] - likelihoods[:, -1]

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a training batch, with the margin of this loss."""
        margin = self.margin(ratios).detach()
        own = {"margin": margin.mean(), "gradient_factor": torch.sigmoid(-margin).mean()}
        return super().measure(ratios, pairs, loss) | own
