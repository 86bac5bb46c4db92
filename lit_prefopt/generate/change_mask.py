"""Where two images differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.errors import check_number


@dataclass
class ChangeMask:
    """Finds where the two halves of a diptych differ.

    Args:
        threshold: Mean absolute difference over the channels from which a pixel has changed, as a
            share of the whole range from black to white.
        dilation: By how many pixels the changed region grows to every side.
    """

    threshold: float = 0.1
    dilation: int = 2

    def __post_init__(self) -> None:
        """Refuse numbers that find nothing or everything."""
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
