"""Aspect-ratio buckets: batches of one shape, in an order independent of the number of ranks.

Samples join the queue of their bucket in the order of a plan, and a queue with a full group of
samples is emitted as a group. So groups come in the order in which they are complete.
As in the plan, blocks are computed lazily: the number of samples of each bucket in a block is
known from its shards before it is shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2s
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.data.images import Size
from lit_prefopt.data.order.plan import Ints, Plan
from lit_prefopt.errors import InputError
from lit_prefopt.utils.lru import LRUCache

LEFT_OUT = -1  # the bucket of unused samples
Buckets = NDArray[np.int16]


class BucketTable(NamedTuple):
    """Counts of an epoch's samples and groups, known without shuffling."""

    samples: Ints  # (blocks + 1, buckets): samples of a bucket before a block
    groups: Ints  # (blocks + 1,): complete groups before a block


class BucketBlock(NamedTuple):
    """One block in its order, without unused samples."""

    places: NDArray[np.int64]  # (samples, 2): shard number, sample number
    members: list[Ints]  # by bucket: rows of `places`
    complete: Ints  # (groups, 2): bucket, and number of earlier groups of it


class BucketPlan:
    """The order of a plan, in groups of samples that share a bucket.

    Less than one group of each bucket is dropped in an epoch.

    Args:
        plan: The underlying order.
        buckets: For each shard the bucket numbers of its samples; LEFT_OUT for those not to use.
        shapes: Width and height of each bucket.
        group: Samples of a group: the batch size of a rank.
    """

    def __init__(
        self, plan: Plan, buckets: Sequence[Buckets], shapes: Sequence[Size], group: int = 1
    ) -> None:
        self.plan, self.shapes, self.group, self.seed = plan, tuple(shapes), group, plan.seed
        self._buckets: Buckets = np.concatenate([*buckets, np.empty(0, np.int16)])
        self._starts = np.cumsum([0, *map(len, buckets)])
        self._counts = _count(buckets, len(self.shapes))
        self.samples = int((self._counts.sum(0) // group).sum()) * group
        self._tables: LRUCache[int, BucketTable] = LRUCache(2, self._make_table)
        # a group's members come from its own block and a few before it
        self._blocks: LRUCache[tuple[int, int], BucketBlock] = LRUCache(16, self._make_block)
        self._groups: LRUCache[tuple[int, int], tuple[int, list[tuple[int, int]]]]
        self._groups = LRUCache(4, self._make_group)

    @property
    def kept(self) -> int:
        """Number of samples with a bucket."""
        return int(self._counts.sum())

    def buckets_of(self, shard: int) -> Buckets:
        """Return the bucket numbers (samples,) of a shard."""
        return self._buckets[self._starts[shard] : self._starts[shard + 1]]

    def slice(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard number, sample number) of the positions start to stop of an epoch."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"[{start}, {stop}) is outside the {self.samples} samples of an epoch")
        places: list[tuple[int, int]] = []
        for number in range(start // self.group, -(-stop // self.group)):
            first = number * self.group
            _, members = self._groups((epoch, number))
            places += members[max(0, start - first) : stop - first]
        return places

    def bucket(self, epoch: int, position: int) -> int:
        """Return the bucket number of a position."""
        return self._groups((epoch, position // self.group))[0]

    def fingerprint(self) -> str:
        """Return a fingerprint of the order."""
        parts = f"{self.plan.fingerprint()}/{self.group}/{self.shapes}/".encode()
        return blake2s(parts + self._buckets.astype("<i2").tobytes(), digest_size=8).hexdigest()

    def _make_table(self, epoch: int) -> BucketTable:
        shards = self.plan.layout(epoch).shards
        firsts = np.arange(0, len(shards), self.plan.shards_per_block)
        blocks = np.add.reduceat(self._counts[shards], firsts)
        samples = np.zeros((len(blocks) + 1, len(self.shapes)), np.int64)
        np.cumsum(blocks, axis=0, out=samples[1:])
        return BucketTable(samples, (samples // self.group).sum(1))

    def _make_block(self, key: tuple[int, int]) -> BucketBlock:
        epoch, number = key
        places = np.stack(self.plan.block(epoch, number), axis=1)
        buckets = self._buckets[self._starts[places[:, 0]] + places[:, 1]]
        places, buckets = places[buckets >= 0], buckets[buckets >= 0]
        members = [np.flatnonzero(buckets == bucket) for bucket in range(len(self.shapes))]
        ordinals = np.empty(len(buckets), np.int64)
        for bucket, rows in enumerate(members):
            ordinals[rows] = self._tables(epoch).samples[number, bucket] + np.arange(len(rows))
        last = (ordinals + 1) % self.group == 0
        return BucketBlock(
            places, members, np.stack([buckets, ordinals // self.group], axis=1)[last]
        )

    def _make_group(self, key: tuple[int, int]) -> tuple[int, list[tuple[int, int]]]:
        epoch, number = key
        samples, groups = self._tables(epoch)
        block = int(np.searchsorted(groups, number, side="right")) - 1
        bucket, before = self._blocks((epoch, block)).complete[number - groups[block]].tolist()
        ordinals = np.arange(before * self.group, (before + 1) * self.group)
        blocks = np.searchsorted(samples[:, bucket], ordinals, side="right") - 1
        places: list[tuple[int, int]] = []
        for block in np.unique(blocks).tolist():
            _places, members, _ = self._blocks((epoch, block))
            rows = members[bucket][ordinals[blocks == block] - samples[block, bucket]]
            places += map(tuple, _places[rows].tolist())
        return bucket, places


def bucket_shapes(resolution: int, step: int) -> list[Size]:
    """Return the widths and heights of the buckets, tall ones first.

    No bucket has more pixels than the square, so none needs more memory; aspect ratios are between
    1:2 and 2:1.

    Args:
        resolution: Width and height of the square one.
        step: Divisor of all widths and heights.
    """
    if step < 1 or resolution % step:
        raise InputError(
            f"resolution {resolution} is not a multiple of bucket_step {step}; change one of them."
        )
    wide = []
    for width in range(resolution + step, 2 * resolution, step):
        height = resolution**2 // width // step * step
        if width <= 2 * height:
            wide.append((width, height))
    tall = [(height, width) for width, height in reversed(wide)]
    return [*tall, (resolution, resolution), *wide]


def nearest(sizes: NDArray[np.integer], shapes: Sequence[Size]) -> Buckets:
    """Return the bucket with the nearest aspect ratio for each size, by the ratio of the two.

    Args:
        sizes: (samples, 2) widths and heights.
        shapes: Width and height of each bucket, tall ones first.
    """
    wide, high = np.maximum(sizes.astype(np.int64), 1).T ** 2
    buckets = np.zeros(len(sizes), np.int16)
    for (w1, h1), (w2, h2) in zip(shapes, shapes[1:], strict=False):
        # beyond the geometric mean of the two ratios; in integers, so that all ranks agree
        buckets += wide * (h1 * h2) >= high * (w1 * w2)
    return buckets


def choose_buckets(
    sizes: Sequence[NDArray[np.integer]], shapes: Sequence[Size], group: int, min_side: int = 0
) -> tuple[list[Buckets], list[Size]]:
    """Assign buckets to all samples, and return them with the shapes in use.

    A shape with less than one group of samples would never be emitted: its samples go to the next
    one.

    Args:
        sizes: For each shard the (samples, 2) widths and heights of the best sides.
        shapes: Width and height of each bucket, tall ones first.
        group: Samples of a group.
        min_side: Samples with a shorter side are not used.
    """
    shapes = list(shapes)
    while True:
        buckets = [nearest(shard, shapes) for shard in sizes]
        for shard, chosen in zip(sizes, buckets, strict=True):
            chosen[shard.min(axis=1) < min_side] = LEFT_OUT
        counts = np.sum(_count(buckets, len(shapes)), axis=0)
        enough = [shape for shape, count in zip(shapes, counts, strict=True) if count >= group]
        if enough == shapes or len(shapes) == 1:
            return buckets, shapes
        shapes = enough or [shapes[int(np.argmax(counts))]]


def _count(buckets: Sequence[Buckets], kinds: int) -> Ints:
    """Count the samples of each bucket in each shard: (shards, buckets)."""
    counts = [np.bincount(shard[shard >= 0], minlength=kinds) for shard in buckets]
    return np.asarray(counts, np.int64).reshape(-1, kinds)
