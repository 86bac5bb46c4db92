"""One-cycle learning-rate schedule of the toy trainings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn


def one_cycle(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int
) -> OptimizerLRScheduler:
    """Return AdamW under a one-cycle schedule (arXiv 1708.07120) over the whole run.

    Args:
        parameters: Parameters to train.
        lr: Peak of the learning rate, after a tenth of the steps.
        weight_decay: Decoupled weight decay.
        steps: Optimizer steps of the run.
    """
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
