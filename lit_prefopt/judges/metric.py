"""A judge as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_prefopt.judges.judge import Judge, checked_scores, full_precision


class JudgeMetric(Metric):
    """Mean of a judge's scores over all images on all ranks.

    Args:
        judge: Scores the images.
        kwargs: Arguments of torchmetrics' `Metric`, such as `sync_on_compute`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, judge: Judge, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> None:
        """Score a batch of images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,) of the predictions, for step-aware judges.
        """
        with torch.no_grad(), full_precision(images) as seen:
            scores = checked_scores(self.judge, seen, texts, t)
        self.total += scores.double().sum().to(self.total.device)
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Return the mean score, a float64 scalar; NaN without images."""
        return self.total / self.count
