"""Shuffled order of samples as pure functions of (seed, epoch) and the shards' sizes.

An epoch has one global order. Its shards are permuted, then samples are shuffled inside blocks of
a few shards. The order is computed lazily: a reader requests a range of positions, and only the
blocks of this range are computed. Ranks slice this one order, so it does not depend on their
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2s
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.utils.lru import LRUCache
from lit_prefopt.utils.seeds import stable_seed

Ints = NDArray[np.int64]


class ShardLayout(NamedTuple):
    """Order of the shards in one epoch."""

    shards: Ints  # the permuted shard numbers
    starts: Ints  # (shards + 1,): position of each one's first sample, and the end


class SampleOrder(Protocol):
    """Interface of a plan for a loader; positions count samples."""

    samples: int  # of an epoch
    seed: int

    def slice(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard number, sample number) of the positions start to stop of an epoch."""
        ...

    def bucket(self, epoch: int, position: int) -> int:
        """Return the number of the bucket that a position's images are brought to."""
        ...

    def fingerprint(self) -> str:
        """Return a short text that two plans share only if they have the same order."""
        ...


class Plan:
    """The order in which samples are read.

    Args:
        counts: Number of samples in each shard.
        seed: Seed of the run.
        shards_per_block: Number of shards that are shuffled together.
        shuffle: Whether to shuffle; if not, every epoch has the stored order.
    """

    def __init__(
        self, counts: Sequence[int], seed: int = 0, shards_per_block: int = 8, shuffle: bool = True
    ) -> None:
        self.counts: Ints = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.shards_per_block, self.shuffle = seed, shards_per_block, shuffle
        self._layouts: LRUCache[int, ShardLayout] = LRUCache(2, self._make_layout)
        # a batch usually touches at most two blocks
        self._blocks: LRUCache[tuple[int, int], Ints] = LRUCache(3, self._make_block)

    def slice(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard number, sample number) of the positions start to stop of an epoch."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"[{start}, {stop}) is outside the {self.samples} samples of an epoch")
        places: list[tuple[int, int]] = []
        starts = self._layouts(epoch).starts[:: self.shards_per_block]
        while start < stop:
            block = int(np.searchsorted(starts, start, side="right")) - 1
            end = int(starts[block + 1]) if block + 1 < len(starts) else self.samples
            first, end = int(starts[block]), min(stop, end)
            shards, samples = self._find(epoch, block, start - first, end - first)
            places += zip(shards.tolist(), samples.tolist(), strict=True)
            start = end
        return places

    def bucket(self, epoch: int, position: int) -> int:
        """Return the bucket number of a position: always 0, since all share one."""
        return 0

    def layout(self, epoch: int) -> ShardLayout:
        """Return the order of the shards in an epoch."""
        return self._layouts(epoch)

    def block(self, epoch: int, number: int) -> tuple[Ints, Ints]:
        """Return the shard numbers and the sample numbers of one block, in its order."""
        return self._find(epoch, number)

    def fingerprint(self) -> str:
        """Return a short text that two plans share only if they have the same order."""
        parts = f"{self.seed}/{self.shards_per_block}/{self.shuffle}/".encode()
        return blake2s(parts + self.counts.astype("<i8").tobytes(), digest_size=8).hexdigest()

    def _find(
        self, epoch: int, block: int, start: int = 0, stop: int | None = None
    ) -> tuple[Ints, Ints]:
        shards, starts = self._layouts(epoch)
        inside = self._blocks((epoch, block))[start:stop] + starts[block * self.shards_per_block]
        rows = np.searchsorted(starts, inside, side="right") - 1
        return shards[rows], inside - starts[rows]

    def _make_layout(self, epoch: int) -> ShardLayout:
        shards = self._order(len(self.counts), "shards", epoch)
        shards = shards[self.counts[shards] > 0]  # an empty shard would share its start
        return ShardLayout(shards, np.concatenate(([0], np.cumsum(self.counts[shards]))))

    def _make_block(self, key: tuple[int, int]) -> Ints:
        epoch, block = key
        starts = self._layouts(epoch).starts
        first = block * self.shards_per_block
        last = min(first + self.shards_per_block, len(starts) - 1)
        return self._order(int(starts[last] - starts[first]), "block", epoch, block)

    def _order(self, n: int, *name: str | int) -> Ints:
        if not self.shuffle:
            return np.arange(n)
        # sorted raw bits: numpy guarantees them across versions, unlike shuffle()
        bits = np.random.PCG64(stable_seed(*name, self.seed)).random_raw(n)
        return np.argsort(bits, kind="stable")


class RankSplit(NamedTuple):
    """Split of a global batch: each rank takes a contiguous range."""

    rank: int
    world: int  # number of ranks
    batch_size: int  # samples per rank

    @property
    def global_batch(self) -> int:
        """Samples of one batch over all ranks."""
        return self.world * self.batch_size

    def rank_positions(self, first: int, batch: int) -> tuple[int, int]:
        """Return the positions of this rank in a batch, counted from the position `first`."""
        start = first + batch * self.global_batch + self.rank * self.batch_size
        return start, start + self.batch_size


def replacement_positions(position: int, samples: int, global_batch: int) -> Iterator[int]:
    """Yield the position itself, then the positions of its replacements, each once.

    These are the same slot of the next global batches (so they belong to the same rank), wrapping
    at the end of the epoch, then the adjacent slot, and so on.
    """
    global_batch = min(global_batch, samples)
    batches = samples // global_batch
    whole = batches * global_batch
    yield position
    for k in range(1, whole):
        yield (position + k * global_batch + k // batches) % whole
