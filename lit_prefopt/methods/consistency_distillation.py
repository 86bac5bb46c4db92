"""Latent consistency distillation (arXiv 2310.04378, 2023): distil a teacher to few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.backbones import LatentConsistency
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.consistency_targets import check_guidance, check_lcm, consistency_points
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods.supervised import SupervisedFineTuning


class ConsistencyDistillation(SupervisedFineTuning):
    """Trains a student to be self-consistent along the teacher's guided paths (Algorithm 1).

    Trains on images, or on the chosen sides of pairs. The backbone must be an LCM (or become one by
    `guidance_width`) with a teacher. The target is the student's own prediction at the cleaner
    point, without gradient, where the paper takes that of an average of past weights: this needs
    no further copy, and improved consistency training (arXiv 2310.14189) found no use in the
    average. The exported weights may still be an average (`PolicyAveraging`).

    Args:
        w: Smallest and largest guidance of the teacher, drawn uniformly for each image, in the form
            cond + w (cond - uncond): the guidance scale of a sampler is 1 + w.
        delta: Difference at which the pseudo-Huber distance turns from square to absolute.
    """

    backbone: LatentConsistency

    takes_reference_errors = False

    def __init__(
        self,
        *args: Any,
        w: tuple[float, float] = (5.0, 15.0),
        delta: float = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_lcm(self.backbone, type(self).__name__)
        check_guidance(w)
        check_number("delta", delta, above=0)
        self.w, self.delta = w, delta

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return minus the distances between the student's predictions at adjacent levels."""
        points = consistency_points(self.backbone, pairs, self.w)
        # First with gradients: autocast would cache the weights that it casts without them.
        prediction = points.upper_prediction(self.backbone)
        with torch.no_grad():
            target = points.lower_prediction(self.backbone)
        error = points.error(prediction, target, self.delta)
        return LogRatios(-error, points.t, error)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the consistency distance of each image, (B,)."""
        return ratios.require("policy_error", type(self).__name__)[:, 0]
