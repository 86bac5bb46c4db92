"""DiffusionNFT (arXiv 2509.16117, 2025) on stored images with scores."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_prefopt.batches import Batch, LogRatios, Pairs
from lit_prefopt.diffusion.denoising import denoising_errors, error_log_ratios
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.moving_average import AverageSchedule, SamplingAverage
from lit_prefopt.reward_groups import Groups, over_ranks
from lit_prefopt.reward_losses import Deviation, contrasted_errors, contrasted_loss


class OfflineNFT(PreferenceDiffusionModule):
    """Moves the policy towards images with high scores and away from images with low ones.

    It needs clean images and their scores, neither steps nor densities; each side of a stored
    sample is an image of its prompt. The paper is about flows; where the denoiser predicts noise or
    v, the clean latents are read from those. Predictions in the loss are not guided. Samples whose
    scores are all equal get weight 0.

    Args:
        beta: Distance of the positive and the negative policy from the sampling policy, as a share
            of the policy's (the paper: 1; 0.1 for OCR and for several rewards).
        drift: Factor of the mean squared difference in velocity from the reference; 0 needs no
            reference.
        deviation: Divisor of advantages: the standard deviation of the prompt's scores (`group`)
            or of all scores (`global`) of a batch or, on policy, of a collection.
        average: Schedule of the moving average of the weights, which is the sampling policy.
    """

    takes_reference_errors = False

    def __init__(
        self,
        *args: Any,
        beta: float,
        drift: float,
        deviation: Deviation = "group",
        average: AverageSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        check_number("drift", drift, 0)
        if not self.backbone.process.HAS_TARGETS:
            raise InputError("A consistency model has no denoising target: take its base instead.")
        self.beta, self.drift, self.groups = beta, drift, Groups(deviation)
        self.average = SamplingAverage(average or AverageSchedule())
        self.needs_reference = drift > 0

    def configure_callbacks(self) -> list[Callback]:
        """Return the moving average of the weights."""
        return [self.average]

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return the latents of a batch with the advantages of their scores."""
        pairs = super().form_pairs(batch)
        return self.groups.weigh(pairs, over_ranks(self)) if self.training else pairs

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to sampling policy, and the terms of the loss, (B, K)."""
        if pairs.advantages is None:  # held-out pairs
            return super().log_ratios(pairs)
        noised, process = self.add_noise(pairs), self.backbone.process
        inputs, shape = (noised.latents, noised.t_per_side), pairs.latents.shape[:2]
        with torch.no_grad(), self.average.active(self):
            old = self.backbone.predict(*inputs, noised.prompt)
        if self.drift:
            with self.backbone.as_reference():
                reference = self.backbone.predict(*inputs, noised.prompt)
        policy = self.backbone.predict(*inputs, noised.prompt)
        clean, late = (process.clean(p, *inputs).unflatten(0, shape) for p in (policy, old))
        errors = contrasted_errors(clean, late, pairs.latents, self.beta)
        terms = dict(zip(("positive", "negative"), errors, strict=True))
        policy, old = policy.unflatten(0, shape), old.unflatten(0, shape)
        if self.drift:
            weight = process.error_weight(noised.t, "velocity")[:, None]
            drift = denoising_errors(policy, reference.unflatten(0, shape)).value
            terms["drift"] = weight * drift
        own, before = (denoising_errors(p, noised.target).value for p in (policy, old))
        return LogRatios(error_log_ratios(own, before), noised.t, own, terms=terms)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the contrasted errors plus the drift, means over the sides, (B,)."""
        terms = cast("dict[str, Tensor]", ratios.terms)
        advantages = cast("Tensor", cast("Pairs", pairs).advantages)
        losses = contrasted_loss(terms["positive"], terms["negative"], advantages, self.beta)
        return (losses + self.drift * terms["drift"] if self.drift else losses).mean(1)

    def held_out_losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor | None:
        """Return None: held-out pairs have no advantages."""
