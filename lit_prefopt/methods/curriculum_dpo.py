"""Curriculum DPO: easy pairs first, then harder ones as well (arXiv 2405.13637, 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_prefopt.backbones import Backbone, LatentConsistency
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.datamodules import CurriculumPairs
from lit_prefopt.diffusion.consistency_targets import check_guidance, check_lcm, consistency_points
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import sigmoid
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.optimizers import OptimizerConfig


class CurriculumDPO(DiffusionDPO):
    """Diffusion-DPO on pairs that come in stages, which the data module opens one by one.

    The loss is Diffusion-DPO's; what is new is which pairs there are (`CurriculumPairs`).
    """

    def on_fit_start(self) -> None:
        """Refuse pairs that come without stages."""
        super().on_fit_start()
        if not isinstance(self.trainer.datamodule, CurriculumPairs):  # type: ignore[attr-defined]
            raise InputError(
                "CurriculumDPO learns from pairs in stages: give `--data CurriculumPairs "
                "--data.stages FOLDER`, or take DiffusionDPO."
            )

    def measure(self, ratios: LogRatios, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
        """Return what is logged of a training batch, and the stage that it came in."""
        return super().measure(ratios, pairs, loss) | _stage(self.trainer)


class ConsistencyDPO(DiffusionDPO):
    """Diffusion-DPO for a latent consistency model: consistency residuals in denoising's place.

    The residual of a network is how far its answer at a noisy point is from the frozen reference's
    answer at the point to which one guided step of the teacher leads.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`. It must be an LCM
            with its teacher.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        beta: Pull to the reference, on mean residuals, without the factor 1/2 of Diffusion-DPO.
        w: Smallest and largest guidance of the teacher, drawn uniformly for each pair, in the form
            cond + w (cond - uncond): the guidance scale of a sampler is 1 + w.
        delta: Difference at which the residual's pseudo-Huber distance turns from square to
            absolute.
        link: Loss of a difference of log-ratios: `lit_prefopt.losses.sigmoid`, `.ipo`, `.hinge`,
            or any function of that form.
        label_smoothing: Share of the labels that are taken to be wrong.
        anchor: Weight of the chosen side's residual, added to the loss; the paper has none.
        validation_draws: Draws of noise level, noise and guidance per held-out pair.
    """

    backbone: LatentConsistency

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        beta: float,
        w: tuple[float, float] = (5.0, 15.0),
        delta: float = 0.001,
        link: Callable = sigmoid,
        label_smoothing: float = 0.0,
        anchor: float = 0.0,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            beta,
            link,
            label_smoothing,
            anchor,
            validation_draws=validation_draws,
        )
        check_lcm(backbone, type(self).__name__)
        if not backbone.has_reference:
            raise InputError(
                "ConsistencyDPO takes its targets from the reference, and the recipe says there is "
                "none: set `--backbone.reference initial`."
            )
        check_guidance(w)
        check_number("delta", delta, above=0)
        self.w, self.delta = w, delta

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the drop in residual from reference to policy, with one target for both."""
        points = consistency_points(self.backbone, pairs, self.w)
        with self.backbone.as_reference():
            target = points.lower_prediction(self.backbone)
            prediction = points.upper_prediction(self.backbone)
            reference = points.error(prediction, target, self.delta)
        policy = points.error(points.upper_prediction(self.backbone), target, self.delta)
        return LogRatios(reference - policy, points.t, policy, reference)

    def measure(self, ratios: LogRatios, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
        """Return what is logged of a training batch, and the stage that it came in, if any."""
        return super().measure(ratios, pairs, loss) | _stage(self.trainer)


def _stage(trainer: Trainer) -> dict[str, Tensor]:
    """Return the stage that training is in, where there are stages."""
    data = getattr(trainer, "datamodule", None)
    return {"stage": torch.tensor(float(data.stage))} if isinstance(data, CurriculumPairs) else {}
