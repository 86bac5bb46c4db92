"""Supervised fine-tuning on the chosen side, the baseline of preference optimisation."""

from __future__ import annotations

from torch import Tensor

from lit_prefopt.batches import Batch, LogRatios, Pairs
from lit_prefopt.losses import Comparisons
from lit_prefopt.module import PreferenceDiffusionModule


class SupervisedFineTuning(PreferenceDiffusionModule):
    """Trains on the chosen side only, without the rejected side and the reference.

    Held-out preference is computed with both sides and, if there is one, the reference. Of single
    images with likes and dislikes, the disliked ones have weight 0.
    """

    needs_reference = False
    chosen_only = True

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return only the chosen side in training; both sides of held-out pairs."""
        if batch.sides == 1:
            batch = batch._replace(weights=batch.weights * batch.labels)
        return super().form_pairs(batch.best() if self.training else batch)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the denoising error of the chosen side, (B,)."""
        return ratios.require("policy_error", type(self).__name__)[:, 0]
