"""The data module of pairs of images."""

from __future__ import annotations

from typing import Literal

from lit_prefopt.batches import ImagePairs
from lit_prefopt.data.images import Augment, Size
from lit_prefopt.data.loading.image_samples import ImageSampleLoader
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.order.shaping import ShapeSettings, make_order
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.datamodules.base import StoredPairs, check_at_least_one


class PairShards(StoredPairs):
    """Pairs of images from shards: in an order of their own, resumable on any number of ranks.

    Args:
        shards: Folder or URL (https, s3, hf) of the shards to train on, with their index.json, or a
            list of them; {000..009} and {a,b} stand for each of their alternatives.
        validation: The held-out shards, named in the same way; none: no validation.
        batch_size: Pairs in a batch of one rank.
        resolution: Width and height of the images that come out.
        crop: Which part of an image of another shape is used: the middle, or a random one, the
            same for both sides. Validation always takes the middle.
        flip: Mirror half of the pairs, both sides alike; not for texts that speak of left and
            right. Validation never does.
        caption_dropout: Share of the training pairs whose prompt is left empty.
        workers: Processes that read and decode, for each rank; 0 does it in the main process.
        seed: Seed of the order, the crops, the flips and whatever else is drawn for a sample.
        shards_per_block: How many shards are shuffled among each other at a time.
        broken_share: Largest share of unreadable pairs that others may stand in for; 0 stops at
            the first one.
        validation_pairs: How many pairs validation uses at most; none: all.
        aspect_buckets: Bring each pair to the one of several shapes that is nearest to its best
            side, each with about as many pixels as the square; a batch has one shape. Validation
            keeps to squares.
        bucket_step: Widths and heights of the shapes are multiples of it, in pixels.
        min_side: Leave out training pairs whose best side is shorter or narrower, in pixels.
        draft: Decode JPEGs that are at least twice as large as they are needed at a half, a quarter
            or an eighth of their size, in a fraction of the time; their pixels differ in rounding
            and in sharpness.
        cache: Folder that remote shards are kept in, shared by all processes of a machine; none:
            `lit-prefopt` in $XDG_CACHE_HOME or ~/.cache.
        cache_size: Most bytes that they take; those opened longest ago make room.
    """

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int,
        resolution: int,
        validation: str | list[str] | None = None,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        caption_dropout: float = 0.0,
        workers: int = 2,
        seed: int = 0,
        shards_per_block: int = 8,
        broken_share: float = 0.01,
        validation_pairs: int | None = None,
        aspect_buckets: bool = False,
        bucket_step: int = 64,
        min_side: int = 0,
        draft: bool = False,
        cache: str | None = None,
        cache_size: int = 64_000_000_000,
    ) -> None:
        super().__init__(
            shards,
            validation,
            batch_size,
            caption_dropout,
            workers,
            seed,
            shards_per_block,
            broken_share,
            validation_pairs,
            ShardCache(cache, cache_size),
        )
        check_at_least_one(resolution=resolution)
        self.shaping = ShapeSettings(resolution, aspect_buckets, bucket_step, min_side)
        self.augment = Augment(self.shaping.square, crop, flip, caption_dropout, draft)

    @property
    def mirrors(self) -> bool:
        """Whether training sees mirrored pictures."""
        return self.augment.flip

    def on_after_batch_transfer(self, batch: ImagePairs, dataloader_idx: int) -> ImagePairs:
        """Scale the images, which travel as they were decoded in a fourth of the bytes.

        Args:
            batch: On the device.
            dataloader_idx: There is one loader.
        """
        return batch.scaled()

    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        """Return the order of their pairs, and the width and height of each bucket."""
        plan = Plan(self.reader.counts, self.seed, self.shards_per_block)
        return make_order(self.reader.shards, plan, self.shaping, self.batch_size)

    def _sample_loader(self) -> ImageSampleLoader:
        augments = [self.augment._replace(size=shape) for shape in self.shapes]
        return ImageSampleLoader(self.reader, self.seed, augments)

    def _held_out_sample_loader(self) -> ImageSampleLoader:
        augment = Augment(self.shaping.square, draft=self.augment.draft)
        return ImageSampleLoader(self.validation_reader, self.seed, [augment])
