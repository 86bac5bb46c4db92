"""Latent consistency distillation (arXiv 2310.04378, 2023): a few-step model out of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone, LatentConsistency
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.consistency_targets import check_guidance, check_lcm, consistency_points
from lit_prefopt.errors import check_number
from lit_prefopt.methods.supervised import SupervisedFineTuning
from lit_prefopt.optimizers import OptimizerConfig


class ConsistencyDistillation(SupervisedFineTuning):
    """Teaches a student to answer alike all along the teacher's guided paths (Algorithm 1).

    It learns from images, or the chosen sides of pairs. The target is the student's own answer at
    the cleaner point, without gradient, and not that of an average of its past weights, as in the
    paper: no further copy, and no state beside the weights; improved consistency training (arXiv
    2310.14189) found the average to do no good. What is taken home may still be an average
    (`PolicyAveraging`).

    Args:
        backbone: The model family; given as the recipe's own key `backbone`. It must be an LCM, or
            become one by `guidance_width`, and have a teacher.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        w: Smallest and largest guidance of the teacher, drawn uniformly for each image, in the form
            cond + w (cond - uncond): the guidance scale of a sampler is 1 + w.
        delta: Difference at which the pseudo-Huber distance turns from square to absolute.
        validation_draws: Draws of noise level, noise and guidance per held-out pair or image.
    """

    backbone: LatentConsistency

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        w: tuple[float, float] = (5.0, 15.0),
        delta: float = 0.001,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(backbone, optimizer, validation_draws)
        check_lcm(backbone, type(self).__name__)
        check_guidance(w)
        check_number("delta", delta, above=0)
        self.w, self.delta = w, delta

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return minus the student's distances to its own answers one step on."""
        points = consistency_points(self.backbone, pairs, self.w)
        # First with gradients: autocast would keep the weights that it casts without them.
        prediction = points.upper_prediction(self.backbone)
        with torch.no_grad():
            target = points.lower_prediction(self.backbone)
        error = points.error(prediction, target, self.delta)
        return LogRatios(-error, points.t, error)

    @property
    def takes_reference_errors(self) -> bool:
        """Whether the reference's denoising errors are all that is asked of it: there are none."""
        return False

    def losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor:
        """Return the distance of every image, (B,)."""
        assert ratios.policy_error is not None
        return ratios.policy_error[:, 0]
