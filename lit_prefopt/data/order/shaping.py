"""Order and image shapes of the training pairs."""

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

SAMPLES = 256  # number of checked pairs if the sizes are not known in advance
CURE = "training on upscaled images causes blur; exclude them by `min_side`, or lower `resolution`"


class ShapeSettings(NamedTuple):
    """Settings of image sizes and buckets."""

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
        """All possible widths and heights."""
        if self.aspect_buckets:
            return bucket_shapes(self.resolution, self.bucket_step)
        return [self.square]


def make_order(
    shards: Sequence[Shard], plan: Plan, shaping: ShapeSettings, batch_size: int
) -> tuple[SampleOrder, list[Size]]:
    """Return the order of an epoch and the width and height of each of its buckets.

    Args:
        shards: The shards.
        plan: The order of their samples.
        shaping: Settings of image sizes and buckets.
        batch_size: Pairs per batch, which share a bucket.
    """
    if not shaping.aspect_buckets and not shaping.min_side:
        return plan, [shaping.square]
    sizes = [_known(shard) for shard in shards]
    # without buckets the order does not depend on the batch size
    group = batch_size if shaping.aspect_buckets else 1
    buckets, shapes = choose_buckets(sizes, shaping.shapes, group, shaping.min_side)
    return BucketPlan(plan, buckets, shapes, group), shapes


def warn_if_enlarged(shards: Sequence[Shard], order: SampleOrder, shapes: Sequence[Size]) -> bool:
    """Warn about upscaled images; return whether their sizes are known.

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
    """Log the number of pairs that an epoch drops, and why."""
    stored = order.plan.samples if isinstance(order, BucketPlan) else order.samples
    kept = order.kept if isinstance(order, BucketPlan) else order.samples
    if kept < stored:
        rank_zero_info(f"{stored - kept} of {stored} pairs are smaller than `min_side`.")
    dropped = kept - order.samples // ranks.global_batch * ranks.global_batch
    if dropped:
        rank_zero_info(
            f"Each epoch drops {dropped} of {kept} pairs, different ones each time, which do not "
            f"fill a batch of {ranks.global_batch}."
        )


def warn_enlarged(sizes: Iterable[NDArray[np.int32]], targets: Iterable[NDArray[np.int64]]) -> None:
    """Warn about the share of pairs whose best side is upscaled.

    Args:
        sizes: For each shard the (samples, 2) widths and heights of the best sides.
        targets: For each shard the (samples, 2) target widths and heights; zeros for unused
            samples.
    """
    count = used = 0
    for stored, target in zip(sizes, targets, strict=True):
        count += int((stored < target).any(axis=1).sum())
        used += int((target > 0).all(axis=1).sum())
    if count:
        rank_zero_warn(
            f"{count / used:.1%} of the {used} training pairs have a best side that is "
            f"upscaled: {CURE}."
        )


class EnlargedCounter:
    """Counts the pairs with an upscaled best side, from the frames of the first batches."""

    def __init__(self) -> None:
        self.pairs = self.enlarged = 0
        self.warned = False

    def count(self, frames: Tensor) -> None:
        """Count the frames (B, K, 6) of a batch; warn once when there are enough."""
        if self.warned:
            return
        stored, shown = frames[:, 0, :2], frames[:, 0, 4:]
        self.pairs += len(frames)
        self.enlarged += int((stored < shown).any(dim=1).sum())
        if self.pairs >= SAMPLES:
            self.warn()

    def warn(self) -> None:
        """Warn about the count, once."""
        if self.enlarged and not self.warned:
            rank_zero_warn(
                f"{self.enlarged / self.pairs:.1%} of the first {self.pairs} training pairs have a "
                f"best side that is upscaled: {CURE} (`min_side` needs an index from "
                "`lit-prefopt shards index`)."
            )
        self.warned = True


def _known(shard: Shard) -> NDArray[np.int32]:
    if shard.sizes is None:
        raise InputError(
            f"{shard.folder} has an index without image sizes, which `aspect_buckets` "
            "and `min_side` need; make it again with "
            f"`lit-prefopt shards index --folder {shard.folder}`."
        )
    return shard.sizes


def _targets(
    order: SampleOrder, shapes: Sequence[Size], shard: int, count: int
) -> NDArray[np.int64]:
    if isinstance(order, BucketPlan):
        # the row of zeros is for LEFT_OUT
        return np.asarray([*shapes, (0, 0)])[order.buckets_of(shard)]
    return np.broadcast_to(np.asarray(shapes[0]), (count, 2))
