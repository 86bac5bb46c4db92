"""Data module of pairs of images."""

from __future__ import annotations

from typing import Any, Literal

from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.data.images import Augment, Size
from lit_prefopt.data.latents.encoding_store import EncodingStore, StoredEncodingLoader
from lit_prefopt.data.loading.image_samples import ImageSampleLoader, SampleLoader
from lit_prefopt.data.order.fixed_draws import FixedDraws
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.order.shaping import ShapeSettings, make_order
from lit_prefopt.data.shards.format import MOST_SIDES
from lit_prefopt.datamodules.base import StoredPairs, check_at_least_one
from lit_prefopt.errors import check_number


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
        keep_encodings: Store latents and prompts at the first visit of a pair, in the folder
            `encodings` of `cache` and up to `cache_size`, and read them from then on; losses are
            the same to the last bit. Held-out pairs are stored too.
        draws: Number of fixed draws of each pair (noise level, noise, crop, flip, dropped caption):
            epoch n uses those of epoch n modulo their number. With `keep_encodings` the
            reference's errors at each draw are computed once. Fresh draws in every epoch if not
            given.
    """

    encodings: EncodingStore | None = None
    """Store of latents and prompts, set by a method that trains on them."""

    encoded_sides: int = MOST_SIDES
    """Number of sides that the method encodes at most of a training pair, the best ones first."""

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
        keep_encodings: bool = True,
        draws: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_at_least_one(resolution=resolution)
        check_number("draws", draws, 1, optional=True)
        self.shaping = ShapeSettings(resolution, aspect_buckets, bucket_step, min_side)
        self.augment = Augment(self.shaping.square, crop, flip, self.caption_dropout, draft)
        self.keep_encodings, self.draws = keep_encodings, draws

    @property
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""
        return self.augment.flip

    @property
    def image_sizes(self) -> list[Size]:
        """Widths and heights of the training buckets, and of the held-out squares."""
        return [*self.shapes, *([] if self.validation is None else [self.shaping.square])]

    @property
    def keeps_latents(self) -> bool:
        """Whether an image is cropped alike at several visits, so that its latents come back."""
        return self.augment.crop == "center" or self.draws is not None

    def on_after_batch_transfer(
        self, batch: ImagePairs | LatentPairs, dataloader_idx: int
    ) -> ImagePairs | LatentPairs:
        """Scale the uint8 images of a batch to float32 in [-1, 1], on the device.

        Args:
            batch: A batch on the device.
            dataloader_idx: Number of the loader, of which there is one.
        """
        return batch.scaled() if isinstance(batch, ImagePairs) else batch

    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        """Return the order of the training pairs, and the width and height of each bucket."""
        plan = Plan(self.reader.counts, self.seed, self.shards_per_block)
        return make_order(self.reader.shards, plan, self.shaping, self.batch_size)

    def _sample_loader(self) -> SampleLoader:
        augments = [self.augment._replace(size=shape) for shape in self.shapes]
        draws = self.draws
        fixed = None if draws is None else FixedDraws(self.order, self.reader.counts, draws)
        images = ImageSampleLoader(self.reader, self.seed, augments, fixed)
        return self._stored(images, self.encoded_sides, keep_latents=self.keeps_latents)

    def _held_out_sample_loader(self) -> SampleLoader:
        augment = Augment(self.shaping.square, draft=self.augment.draft)
        images = ImageSampleLoader(self.validation_reader, self.seed, [augment])
        return self._stored(images, MOST_SIDES, keep_latents=True)

    def _stored(self, images: ImageSampleLoader, sides: int, *, keep_latents: bool) -> SampleLoader:
        """Return the loader that reads encodings where they are stored."""
        if self.encodings is None:
            return images
        return StoredEncodingLoader(images, self.encodings, keep_latents=keep_latents, sides=sides)
