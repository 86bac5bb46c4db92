"""Data module of pairs of images."""

from __future__ import annotations

from typing import Any, Literal

from lit_prefopt.batches import ImagePairs
from lit_prefopt.data.images import Augment, Size
from lit_prefopt.data.loading.image_samples import ImageSampleLoader
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.order.shaping import ShapeSettings, make_order
from lit_prefopt.datamodules.base import StoredPairs, check_at_least_one


class PairShards(StoredPairs):
    """Pairs of images from shards, in a shuffled order that resumes on any number of ranks.

    Args:
        resolution: Width and height of the images after resizing and cropping.
        crop: Crop of images that are not square: the center, or a random one, the same for both
            sides. Validation always uses the center.
        flip: Mirror half of the pairs, both sides alike; not for prompts with left and right.
            Validation never mirrors.
        aspect_buckets: Resize each pair to the one of several shapes that is nearest to its best
            side, each with about as many pixels as the square; a batch has one shape. Validation
            uses squares.
        bucket_step: Widths and heights of the shapes are multiples of it, in pixels.
        min_side: Leave out training pairs whose best side is shorter or narrower, in pixels.
        draft: Decode JPEGs of at least twice the needed size at a half, a quarter or an eighth of
            their size, in a fraction of the time; pixels differ in rounding and sharpness.
    """

    def __init__(
        self,
        *args: Any,
        resolution: int,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        aspect_buckets: bool = False,
        bucket_step: int = 64,
        min_side: int = 0,
        draft: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_at_least_one(resolution=resolution)
        self.shaping = ShapeSettings(resolution, aspect_buckets, bucket_step, min_side)
        self.augment = Augment(self.shaping.square, crop, flip, self.caption_dropout, draft)

    @property
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""
        return self.augment.flip

    @property
    def image_sizes(self) -> list[Size]:
        """Widths and heights of the training buckets, and of the held-out squares."""
        return [*self.shapes, *([] if self.validation is None else [self.shaping.square])]

    def on_after_batch_transfer(self, batch: ImagePairs, dataloader_idx: int) -> ImagePairs:
        """Scale the uint8 images of a batch to float32 in [-1, 1], on the device.

        Args:
            batch: A batch on the device.
            dataloader_idx: Number of the loader, of which there is one.
        """
        return batch.scaled()

    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        """Return the order of the training pairs, and the width and height of each bucket."""
        plan = Plan(self.reader.counts, self.seed, self.shards_per_block)
        return make_order(self.reader.shards, plan, self.shaping, self.batch_size)

    def _sample_loader(self) -> ImageSampleLoader:
        augments = [self.augment._replace(size=shape) for shape in self.shapes]
        return ImageSampleLoader(self.reader, self.seed, augments)

    def _held_out_sample_loader(self) -> ImageSampleLoader:
        augment = Augment(self.shaping.square, draft=self.augment.draft)
        return ImageSampleLoader(self.validation_reader, self.seed, [augment])
