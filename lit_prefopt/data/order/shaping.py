"""The order of the training pairs, and the shapes that they are brought to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_prefopt.data.images import Size
from lit_prefopt.data.order.buckets import BucketPlan, bucket_shapes, choose_buckets
from lit_prefopt.data.order.plan import Plan, RankSplit, SampleOrder
from lit_prefopt.data.shards.format import Shard
from lit_prefopt.errors import InputError

SAMPLES = 256  # that are looked at where the sizes are not known beforehand
CURE = "blurred images teach blur; leave them out by `min_side`, or lower `resolution`"


class ShapeSettings(NamedTuple):
    """What is wanted of the images' sizes."""

    resolution: int
    aspect_buckets: bool = False
    bucket_step: int = 64
    min_side: int = 0

    @property
    def square(self) -> Size:
        """Width and height without buckets."""
        return self.resolution, self.resolution

    @property
    def shapes(self) -> list[Size]:
        """All widths and heights that there may be."""
        if self.aspect_buckets:
            return bucket_shapes(self.resolution, self.bucket_step)
        return [self.square]


def make_order(
    shards: Sequence[Shard], plan: Plan, shaping: ShapeSettings, batch_size: int
) -> tuple[SampleOrder, list[Size]]:
    """Return the order of an epoch and the width and height of each of its buckets.

    Args:
        shards: The shards.
        plan: The order in which their samples come.
        shaping: What is wanted of the images' sizes.
        batch_size: Pairs of a batch, which share a bucket.
    """
    if not shaping.aspect_buckets and not shaping.min_side:
        return plan, [shaping.square]
    sizes = [_known(shard) for shard in shards]
    # without buckets any sample follows any other, whatever the batch size
    group = batch_size if shaping.aspect_buckets else 1
    buckets, shapes = choose_buckets(sizes, shaping.shapes, group, shaping.min_side)
    return BucketPlan(plan, buckets, shapes, group), shapes


def warn_if_enlarged(shards: Sequence[Shard], order: SampleOrder, shapes: Sequence[Size]) -> bool:
    """Warn of images that have to be enlarged; return whether their sizes are known.

    Args:
        shards: The shards.
        order: The order of their samples.
        shapes: Width and height of each bucket.
    """
    sizes = [shard.sizes for shard in shards if shard.sizes is not None]
    if len(sizes) < len(shards):
        return False
    warn_enlarged(sizes, (_targets(order, shapes, n, len(s)) for n, s in enumerate(sizes)))
    return True


def log_dropped(order: SampleOrder, ranks: RankSplit) -> None:
    """Say how many pairs an epoch leaves out, and why."""
    stored = order.plan.samples if isinstance(order, BucketPlan) else order.samples
    kept = order.kept if isinstance(order, BucketPlan) else order.samples
    if kept < stored:
        rank_zero_info(f"{stored - kept} of {stored} pairs are smaller than `min_side`.")
    dropped = kept - order.samples // ranks.global_batch * ranks.global_batch
    if dropped:
        rank_zero_info(
            f"Each epoch leaves out {dropped} of {kept} pairs, others every time: they fill no "
            f"batch of {ranks.global_batch}."
        )


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


class EnlargedCounter:
    """Counts the pairs whose best side was enlarged, from the frames of the first batches."""

    def __init__(self) -> None:
        self.pairs = self.enlarged = 0
        self.warned = False

    def count(self, frames: Tensor) -> None:
        """Note the frames (B, K, 6) of a batch; warn once when enough were seen."""
        if self.warned:
            return
        stored, shown = frames[:, 0, :2], frames[:, 0, 4:]
        self.pairs += len(frames)
        self.enlarged += int((stored < shown).any(dim=1).sum())
        if self.pairs >= SAMPLES:
            self.warn()

    def warn(self) -> None:
        """Warn of what was counted, once."""
        if self.enlarged and not self.warned:
            rank_zero_warn(
                f"{self.enlarged / self.pairs:.1%} of the first {self.pairs} training pairs have a "
                f"best side that has to be enlarged: {CURE} (`min_side` wants an index that was "
                "made by `lit-prefopt shards index`)."
            )
        self.warned = True


def _known(shard: Shard) -> NDArray[np.int32]:
    if shard.sizes is None:
        raise InputError(
            f"{shard.folder} has an index without the sizes of the images, which `aspect_buckets` "
            f"and `min_side` want; make it again with `lit-prefopt shards index {shard.folder}`."
        )
    return shard.sizes


def _targets(
    order: SampleOrder, shapes: Sequence[Size], shard: int, count: int
) -> NDArray[np.int64]:
    if isinstance(order, BucketPlan):
        # the row of zeros is that of LEFT_OUT
        return np.asarray([*shapes, (0, 0)])[order.buckets_of(shard)]
    return np.broadcast_to(np.asarray(shapes[0]), (count, 2))
