"""Mask of the pixels in which two images differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.errors import check_number


@dataclass
class ChangeMask:
    """Computes the mask of the region in which the two halves of a diptych differ.

    Args:
        threshold: Mean absolute difference over the channels above which a pixel counts as
            changed, as a share of the range from black to white.
        dilation: Pixels by which the changed region is dilated on every side.
    """

    threshold: float = 0.1
    dilation: int = 2

    def __post_init__(self) -> None:
        """Check the ranges of the numbers."""
        check_number("threshold", self.threshold, most=1, above=0)
        check_number("dilation", self.dilation, 0)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return 1 where the images differ and 0 elsewhere, (B, 1, H, W) float32.

        Args:
            left: (B, 3, H, W) in [-1, 1].
            right: (B, 3, H, W) in [-1, 1].
        """
        apart = (left.float() - right.float()).abs().mean(1, keepdim=True) / 2
        changed = (apart > self.threshold).float()
        return F.max_pool2d(changed, 2 * self.dilation + 1, stride=1, padding=self.dilation)
