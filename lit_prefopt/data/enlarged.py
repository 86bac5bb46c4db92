"""Images that have to be enlarged to reach the resolution: how many there are, said once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

SAMPLES = 256  # that are looked at where the sizes are not known beforehand
CURE = "blurred images teach blur; leave them out by `min_side`, or lower `resolution`"


def warn_enlarged(sizes: Iterable[NDArray[np.int32]], targets: Iterable[NDArray[np.int64]]) -> None:
    """Warn of the share of pairs whose best side has to be enlarged.

    Args:
        sizes: For each shard the (samples, 2) widths and heights of the best sides.
        targets: For each shard the (samples, 2) widths and heights that they are brought to;
            zeros for samples that are not used.
    """
    count = used = 0
    for stored, target in zip(sizes, targets, strict=True):
        count += int((stored < target).any(axis=1).sum())
        used += int((target > 0).all(axis=1).sum())
    if count:
        rank_zero_warn(
            f"{count / used:.1%} of the {used} training pairs have a best side that has to be "
            f"enlarged: {CURE}."
        )


class Enlarged:
    """Counts the pairs whose best side was enlarged, from the frames of the first batches."""

    def __init__(self) -> None:
        self.pairs = self.enlarged = 0
        self.told = False

    def count(self, frames: Tensor) -> None:
        """Note the frames (B, K, 6) of a batch; warn once when enough were seen."""
        if self.told:
            return
        stored, shown = frames[:, 0, :2], frames[:, 0, 4:]
        self.pairs += len(frames)
        self.enlarged += int((stored < shown).any(dim=1).sum())
        if self.pairs >= SAMPLES:
            self.tell()

    def tell(self) -> None:
        """Warn of what was counted, once."""
        if self.enlarged and not self.told:
            rank_zero_warn(
                f"{self.enlarged / self.pairs:.1%} of the first {self.pairs} training pairs have a "
                f"best side that has to be enlarged: {CURE} (`min_side` wants an index that was "
                "made by `lit-prefopt shards index`)."
            )
        self.told = True
