"""Methods whose pairs must be made by the weights as they stand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import ImagePairs, LogRatios, Pairs, Steps
from lit_prefopt.diffusion.rollout import logp
from lit_prefopt.diffusion.settings import Sampling
from lit_prefopt.judges.judge import Judge, checked_scores
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.optimizers import OptimizerConfig


class OnPolicyModule(PreferenceDiffusionModule):
    """Learns from its own roll-outs: how much likelier the policy finds each step.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        judge: Says which roll-out is the better one.
        sampling: How it rolls out; eta must be above 0.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        judge: Judge,
        sampling: Sampling,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(backbone, optimizer, validation_draws)
        self.judge = judge
        self.sampling = sampling

    @abstractmethod
    def collect(self, texts: list[str], seeds: Tensor) -> Steps:
        """Return what the policy as it stands makes of B prompts; it may be no row at all.

        Args:
            texts: B prompts.
            seeds: (B,) int64; everything random is drawn from them.
        """

    def form_pairs(self, batch: ImagePairs | Pairs | Steps) -> Pairs | Steps:  # type: ignore[override]
        """Return collected steps as they are; held-out pairs are formed as in every method."""
        return batch if isinstance(batch, Steps) else super().form_pairs(batch)

    def log_ratios(self, pairs: Pairs | Steps) -> LogRatios:  # type: ignore[override]
        """Return how much likelier the policy finds every step than the reference does."""
        if not isinstance(pairs, Steps):
            return super().log_ratios(pairs)
        empty = self.backbone.embed([""])
        with self.backbone.as_reference():
            reference = logp(self.backbone, self.sampling, pairs, empty)
        policy = logp(self.backbone, self.sampling, pairs, empty)
        return LogRatios(policy - reference, pairs.t)

    @torch.no_grad()
    def judged(self, latents: Tensor, texts: Sequence[str], t: Tensor) -> Tensor:
        """Return the judge's scores of decoded latents, (B,) float32.

        Args:
            latents: Clean latents or predictions of them, (B, C, H, W).
            texts: B prompts.
            t: Timesteps (B,) that they were predicted at; 0 for clean ones.

        Raises:
            InputError: The judge does not give one number for each image.
        """
        parts = latents.split(self.sampling.batch_size)
        images = torch.cat([self.backbone.decode(part) for part in parts])
        return checked_scores(self.judge, images, texts, t)
