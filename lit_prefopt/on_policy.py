"""Methods whose pairs must be made by the weights as they stand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Batch, LogRatios, Pairs, Steps, Trajectories, select_rows
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.judges.judge import Judge, checked_scores
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.processes.settings import Sampling


class OnPolicyModule(PreferenceDiffusionModule):
    """Learns from its own roll-outs: how much likelier the policy finds each step.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        judge: Says which roll-out is the better one.
        sampling: How it rolls out; eta must be above 0.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    COLLECTS: ClassVar[type[Steps] | type[Trajectories]] = Steps
    """What `collect` returns."""

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
        self.rollout = Rollout(backbone, sampling)
        self.images_judged = 0

    def setup(self, stage: str | None = None) -> None:
        """Find out what the judge lacks before anything is rolled out."""
        super().setup(stage)
        if stage == "fit":
            self.judge.prepare()

    @abstractmethod
    def collect(self, texts: list[str], seeds: Tensor) -> Any:
        """Return what the policy as it stands makes of B prompts; it may be no row at all.

        Args:
            texts: B prompts.
            seeds: (B,) int64; everything random is drawn from them.
        """

    def draw(self, collected: Any, which: Tensor, seeds: Tensor) -> Steps:
        """Return what to learn from, out of what was collected; here these rows as they are.

        Args:
            collected: What `collect` returned.
            which: Rows of it, (B,) int64.
            seeds: (B,) int64; everything random is drawn from them.
        """
        return select_rows(collected, which)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Return the log-ratios (B, K, S) as the loss sees them; here as they are."""
        return log_ratios

    def form_pairs(self, batch: Batch | Steps) -> Pairs | Steps:  # type: ignore[override]
        """Return collected steps as they are; held-out pairs are formed as in every method."""
        return batch if isinstance(batch, Steps) else super().form_pairs(batch)

    def log_ratios(self, pairs: Pairs | Steps) -> LogRatios:  # type: ignore[override]
        """Return how much likelier the policy finds every step than the reference does."""
        if not isinstance(pairs, Steps):
            return super().log_ratios(pairs)
        with self.backbone.as_reference():
            reference = logp(self.backbone, self.sampling, pairs)
        policy = logp(self.backbone, self.sampling, pairs)
        return LogRatios(policy - reference, pairs.t)

    def measure(self, ratios: LogRatios, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
        """Return what every method logs, and the share of ratios that pull no more."""
        values = ratios.values.detach()
        clipped = (self.clipped(values) != values).float().mean()
        return super().measure(ratios, pairs, loss) | {"clipped": clipped}

    @torch.no_grad()
    def judge_latents(self, latents: Tensor, texts: Sequence[str], t: Tensor) -> Tensor:
        """Return the judge's scores of decoded latents, (B,) float32.

        Args:
            latents: Clean latents or predictions of them, (B, C, H, W).
            texts: B prompts.
            t: Timesteps (B,) that they were predicted at; 0 for clean ones.

        Raises:
            InputError: The judge does not give one number for each image.
        """
        parts = latents.split(self.sampling.batch_size)
        images = torch.cat([self.backbone.preview(part) for part in parts])
        scores = checked_scores(self.judge, images, texts, t)
        self.window.add({"judge": scores.mean()})
        self.images_judged += len(images)
        return scores
