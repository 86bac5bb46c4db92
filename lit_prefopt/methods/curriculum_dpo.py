"""Curriculum DPO: pairs in stages, from easy to hard (arXiv 2405.13637, 2024)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_prefopt.backbones import LatentConsistency
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.datamodules import CurriculumPairs
from lit_prefopt.diffusion.consistency_targets import check_guidance, check_lcm, consistency_points
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class CurriculumDPO(DiffusionDPO):
    """Diffusion-DPO on pairs in stages, which the data module (`CurriculumPairs`) adds one by one.

    The loss is Diffusion-DPO's.
    """

    def on_fit_start(self) -> None:
        """Check that the data module has stages."""
        super().on_fit_start()
        if not isinstance(self.trainer.datamodule, CurriculumPairs):  # type: ignore[attr-defined]
            raise InputError(
                "CurriculumDPO trains on pairs in stages: give `--data CurriculumPairs "
                "--data.stages FOLDER`, or take DiffusionDPO."
            )

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a training batch, and the current stage."""
        return super().measure(ratios, pairs, loss) | _stage(self.trainer)


class ConsistencyDPO(DiffusionDPO):
    """Diffusion-DPO for latent consistency models, with consistency residuals as errors.

    The residual of a network is the distance between its prediction at a noisy point and the frozen
    reference's prediction at the point one guided step of the teacher further on. The backbone must
    be an LCM with its teacher.

    Args:
        beta: Strength of the regularisation to the reference, on mean residuals, without the factor
            1/2 of Diffusion-DPO.
        w: Smallest and largest guidance of the teacher, drawn uniformly for each pair, in the form
            cond + w (cond - uncond): the guidance scale of a sampler is 1 + w.
        delta: Difference at which the residual's pseudo-Huber distance turns from square to
            absolute.
        anchor: Weight of the chosen side's residual, added to the loss; the paper has none.
    """

    backbone: LatentConsistency

    takes_reference_errors = False

    def __init__(
        self,
        *args: Any,
        beta: float,
        w: tuple[float, float] = (5.0, 15.0),
        delta: float = 0.001,
        anchor: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # residuals have no gradient overlap and no other reading, and noise levels are those of
        # the distillation
        super().__init__(
            *args,
            beta=beta,
            anchor=anchor,
            chosen_protection=None,
            gamma=1.0,
            gamma_steps=50,
            weighting=None,
            **kwargs,
        )
        check_lcm(self.backbone, type(self).__name__)
        if not self.backbone.has_reference:
            raise InputError(
                "ConsistencyDPO takes its targets from the reference, and the recipe has none: set "
                "`--backbone.reference initial`."
            )
        check_guidance(w)
        check_number("delta", delta, above=0)
        self.w, self.delta = w, delta

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the drop in residual from reference to policy, for the same target."""
        points = consistency_points(self.backbone, pairs, self.w)
        with self.backbone.as_reference():
            target = points.lower_prediction(self.backbone)
            prediction = points.upper_prediction(self.backbone)
            reference = points.error(prediction, target, self.delta)
        policy = points.error(points.upper_prediction(self.backbone), target, self.delta)
        return LogRatios(reference - policy, points.t, policy, reference)

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a training batch, and the current stage, if there is one."""
        return super().measure(ratios, pairs, loss) | _stage(self.trainer)


def _stage(trainer: Trainer) -> dict[str, Tensor]:
    """Return the current stage by its log name; nothing without stages."""
    data = getattr(trainer, "datamodule", None)
    return {"stage": torch.tensor(float(data.stage))} if isinstance(data, CurriculumPairs) else {}
