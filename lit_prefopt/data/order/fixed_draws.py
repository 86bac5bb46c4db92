"""Fixed draws of a training: from the n-th epoch on, the random numbers of earlier epochs."""

from __future__ import annotations

import numpy as np

from lit_prefopt.data.order.plan import Ints, SampleOrder
from lit_prefopt.utils.lru import LRUCache


class FixedDraws:
    """The draws of each pair: those of its first epochs, again and again.

    Epoch e uses the draws of epoch e modulo their number, so that a run of as many epochs as there
    are draws is the run without fixed ones. All of it follows from the order: a resumed run, or
    one on other ranks, gets the same draws.

    Args:
        order: The order of the training pairs.
        counts: Number of samples in each shard.
        draws: Number of draws of each pair.
    """

    def __init__(self, order: SampleOrder, counts: list[int], draws: int) -> None:
        self.order, self.draws = order, draws
        self._starts = np.cumsum([0, *counts])
        self._positions: LRUCache[int, Ints] = LRUCache(1, self._make_positions)

    def draw(self, epoch: int, position: int, shard: int, sample: int) -> tuple[int, int]:
        """Return the epoch and the position whose random numbers a sample uses.

        Args:
            epoch: Number of the epoch.
            position: Position of the sample in it.
            shard: Number of the sample's shard.
            sample: Number of the sample in the shard.
        """
        if epoch < self.draws:
            return epoch, position
        index = int(self._starts[shard]) + sample
        return epoch % self.draws, int(self._positions(epoch % self.draws)[index])

    def _make_positions(self, epoch: int) -> Ints:
        """Return the position of every stored sample in an epoch.

        A sample that the epoch leaves out has one behind its end, which no other sample has.
        """
        positions = self.order.samples + np.arange(int(self._starts[-1]), dtype=np.int64)
        places = np.asarray(self.order.slice(epoch, 0, self.order.samples), np.int64)
        positions[self._starts[places[:, 0]] + places[:, 1]] = np.arange(self.order.samples)
        return positions
