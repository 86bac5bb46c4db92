"""The plan: who reads which sample when, as pure functions of (seed, epoch) and the shards' sizes.

An epoch has one global order. Its shards are permuted, then samples are shuffled inside blocks of
a few shards. The order is never made as a whole: a reader asks for a stretch of it and only the
blocks that the stretch touches are made. Ranks slice this one order, so it does not depend on
their number.
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
    """How the shards of one epoch lie behind each other."""

    shards: Ints  # the permuted shard numbers
    starts: Ints  # (shards + 1,): position of each one's first sample, and the end


class SampleOrder(Protocol):
    """What a loader asks of a plan; positions count samples."""

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
        counts: How many samples each shard holds.
        seed: Seed of the run.
        shards_per_block: How many shards are shuffled among each other.
        shuffle: Whether to shuffle at all; if not, every epoch has the stored order.
    """

    def __init__(
        self, counts: Sequence[int], seed: int = 0, shards_per_block: int = 8, shuffle: bool = True
    ) -> None:
        self.counts: Ints = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.shards_per_block, self.shuffle = seed, shards_per_block, shuffle
        self._layouts: LRUCache[int, ShardLayout] = LRUCache(2, self._make_layout)
        # a stretch of one batch touches two blocks as a rule
        self._blocks: LRUCache[tuple[int, int], Ints] = LRUCache(3, self._make_block)

    def slice(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard number, sample number) of the positions start to stop of an epoch."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"[{start}, {stop}) leaves the {self.samples} samples of an epoch")
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
        """Return the number of a position's bucket: here all share one."""
        return 0

    def layout(self, epoch: int) -> ShardLayout:
        """Return how the shards of an epoch lie behind each other."""
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
        # raw bits, sorted: numpy promises to keep these from version to version, unlike shuffle()
        bits = np.random.PCG64(stable_seed(*name, self.seed)).random_raw(n)
        return np.argsort(bits, kind="stable")


class RankSplit(NamedTuple):
    """How one global batch is dealt out: each rank takes a stretch of it."""

    rank: int
    world: int  # how many ranks there are
    batch_size: int  # samples of one rank

    @property
    def global_batch(self) -> int:
        """Samples of one batch over all ranks."""
        return self.world * self.batch_size

    def rank_positions(self, first: int, batch: int) -> tuple[int, int]:
        """Return the positions of this rank in a batch, counted from the position `first`."""
        start = first + batch * self.global_batch + self.rank * self.batch_size
        return start, start + self.batch_size


def replacement_positions(position: int, samples: int, global_batch: int) -> Iterator[int]:
    """Yield the position itself, then those that may stand in for it, each once.

    They are the same slot of the next global batches (so they belong to the same rank), around
    the end of the epoch, then the slot beside it, and so on.
    """
    global_batch = min(global_batch, samples)
    batches = samples // global_batch
    whole = batches * global_batch
    yield position
    for k in range(1, whole):
        yield (position + k * global_batch + k // batches) % whole
