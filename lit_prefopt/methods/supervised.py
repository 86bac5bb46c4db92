"""Supervised fine-tuning on the chosen side: the baseline that every table must hold."""

from __future__ import annotations

from torch import Tensor

from lit_prefopt.batches import ImagePairs, LogRatios, Pairs
from lit_prefopt.module import PreferenceDiffusionModule


class SupervisedFineTuning(PreferenceDiffusionModule):
    """Learns the chosen side and does not look at the other, nor at the reference.

    Held-out preference is measured as for every other method.
    """

    def form_pairs(self, batch: ImagePairs | Pairs) -> Pairs:
        """Return the chosen side alone while training."""
        if self.training and isinstance(batch, ImagePairs):
            batch = batch.best()
        pairs = super().form_pairs(batch)
        return pairs.best() if self.training else pairs

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the policy's errors while training, without asking the reference."""
        if not self.training:
            return super().log_ratios(pairs)
        noised = self.add_noise(pairs)
        error = self.errors(noised).value
        return LogRatios(-0.5 * error, noised.t, error)

    def losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor:
        """Return the denoising error of the chosen side, (B,)."""
        assert ratios.policy_error is not None
        return ratios.policy_error[:, 0]
