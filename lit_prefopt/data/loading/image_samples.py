"""Load image samples: decode and augment stored bytes, and collate samples into a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.data.images import (
    Augment,
    BrokenSample,
    Crop,
    ImageHeader,
    Pixels,
    Size,
    decode,
)
from lit_prefopt.data.loading.side_numbers import SideNumbers, collate_numbers
from lit_prefopt.data.order.fixed_draws import FixedDraws
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.data.shards.sides import is_like
from lit_prefopt.utils.seeds import sample_seed

MAX_WEIGHT = 3e38  # of a pair; a larger one would be infinite in float32


class SampleRef(NamedTuple):
    """Reference to a stored sample and to its position in an epoch's order."""

    epoch: int
    position: int  # in the epoch's order
    bucket: int  # of the position
    shard: int  # where the sample is stored; for a stand-in its own place, not the position's
    sample: int


class SampleLoader(Protocol):
    """Load samples one by one, and collate them into a batch."""

    @property
    def reader(self) -> ShardReader:
        """Reader of stored samples by (shard number, sample number)."""
        ...

    def load(self, ref: SampleRef) -> Any:
        """Return a sample; raise BrokenSample, which names it, if it cannot be used."""
        ...

    def collate(self, samples: list[Any], broken: tuple[str, ...]) -> Any:
        """Return the batch of some samples.

        Args:
            samples: The samples.
            broken: Names of the unreadable samples that some of them replace.
        """
        ...


class ImageSample(NamedTuple):
    """Decoded and augmented sample of a batch."""

    images: list[Pixels]  # K sides (H, W, 3)
    text: str
    seed: int
    label: float
    weight: float
    key: str
    mask: Tensor | None  # (1, H, W)
    frames: list[list[int]]  # (K, 6)
    known: SideNumbers


class PreparedSample(NamedTuple):
    """Sample whose headers were read and whose crop was drawn; its pixels are not decoded yet."""

    stored: Sample
    headers: list[ImageHeader]  # of the sides
    augment: Augment
    crop: Crop
    text: str  # "" where the caption was dropped
    seed: int

    @property
    def frames(self) -> list[list[int]]:
        """Size conditioning of each side, (K, 6): see `Prompt`."""
        return [self.augment.frame(side.size, self.crop) for side in self.headers]

    def decode(self) -> ImageSample:
        """Decode and crop the images; raise BrokenSample, which names the sample, on failure."""
        sample, augment, crop = self.stored, self.augment, self.crop
        images: list[Image.Image | Pixels] = []
        for name, side in zip(sample.names, self.headers, strict=True):
            with _name_side(sample, name):
                images.append(_decoded(side, crop.size, draft=augment.draft))
        best = images[0].size if isinstance(images[0], Image.Image) else crop.size
        mask = None
        if sample.mask is not None:
            with _name_side(sample, "mask"):
                mask = augment.mask(decode(sample.mask, "L"), self.headers[0].size, crop)
        return ImageSample(
            images=[augment.pixels(image, best, crop) for image in images],
            text=self.text,
            seed=self.seed,
            label=label_of(sample),
            weight=weight_of(sample),
            key=sample.name,
            mask=mask,
            frames=self.frames,
            known=SideNumbers.from_meta(sample.meta, sample.side_count),
        )


class ImageSampleLoader:
    """Load, decode and augment pairs of images.

    Args:
        reader: Reads a sample by (shard number, sample number).
        seed: Seed of the run.
        augments: Augmentation of images and text, for each bucket.
        fixed: The draws that each pair keeps; fresh ones in every epoch if not given.
    """

    def __init__(
        self,
        reader: ShardReader,
        seed: int,
        augments: Sequence[Augment],
        fixed: FixedDraws | None = None,
    ) -> None:
        self.reader, self.seed, self.augments, self.fixed = reader, seed, augments, fixed

    def prepare(self, ref: SampleRef) -> PreparedSample:
        """Return a sample before decoding, in the shape of its position's bucket."""
        epoch, position = ref.epoch, ref.position
        if self.fixed is not None:
            epoch, position = self.fixed.draw(epoch, position, ref.shard, ref.sample)
        stored = self.reader(ref.shard, ref.sample)
        seed = sample_seed(self.seed, epoch, position)
        return prepare_sample(stored, self.augments[ref.bucket], seed)

    def load(self, ref: SampleRef) -> Any:
        """Return a sample in the shape of its position's bucket."""
        return self.prepare(ref).decode()

    def collate(self, samples: list[Any], broken: tuple[str, ...]) -> ImagePairs | LatentPairs:
        """Return the batch of some samples; for the arguments see `SampleLoader`."""
        return collate(samples, broken)


def prepare_sample(sample: Sample, augment: Augment, seed: int) -> PreparedSample:
    """Read the headers of a sample and draw its crop; for the arguments see `load_sample`."""
    text = prompt_of(sample)
    sides: list[ImageHeader] = []
    for name, data in zip(sample.names, sample.sides, strict=True):
        with _name_side(sample, name):
            sides.append(ImageHeader.read(data))
    with _name_side(sample, sample.names[0]):
        crop, dropped = augment.draw(sides[0].size, seed)
    return PreparedSample(sample, sides, augment, crop, "" if dropped else text, seed)


def load_sample(sample: Sample, augment: Augment, seed: int) -> ImageSample:
    """Return a decoded and augmented sample; raise BrokenSample, which names it, if it is broken.

    Args:
        sample: The stored sample.
        augment: Its augmentation.
        seed: The sample's seed.
    """
    return prepare_sample(sample, augment, seed).decode()


class StoredSample(Protocol):
    """Stored sample of images or of latents."""

    @property
    def name(self) -> str:
        """Name, for messages."""
        ...

    @property
    def text(self) -> str:
        """The prompt."""
        ...

    @property
    def meta(self) -> dict[str, Any]:
        """Content of its .json."""
        ...

    @property
    def side_count(self) -> int:
        """Number of its images."""
        ...


def label_of(sample: StoredSample) -> float:
    """Return the probability that the first side is the better one; 1 by default.

    Of a single image it is 1 if the image is liked and 0 if not, and is not optional.
    """
    if sample.side_count == 1 and not is_like(sample.meta):
        raise BrokenSample(
            f"{sample.name} is a single image without the label 1 (liked) or 0 (disliked) in its "
            ".json"
        )
    return _number(sample, "label", 1.0, most=1.0)


def weight_of(sample: StoredSample) -> float:
    """Return the factor of the pair's loss; 1 by default."""
    return _number(sample, "weight", 1.0, most=MAX_WEIGHT)


def prompt_of(sample: StoredSample) -> str:
    """Return the prompt of a sample; raise BrokenSample if it is empty."""
    if not sample.text.strip():
        raise BrokenSample(
            f"{sample.name} has an empty prompt (.txt): write one, or leave the pair out; to train "
            "without prompts is what `caption_dropout` is for"
        )
    return sample.text


def collate(samples: list[ImageSample], broken: tuple[str, ...] = ()) -> ImagePairs:
    """Return the batch of some samples; for the arguments see `SampleLoader`."""
    masks = None
    if any(sample.mask is not None for sample in samples):  # without a mask, all may differ
        all_ones = torch.ones(1, *samples[0].images[0].shape[:2])
        masks = torch.stack([all_ones if s.mask is None else s.mask for s in samples])
    scores, noise_seeds = collate_numbers([sample.known for sample in samples])
    return ImagePairs(
        images=_stack([sample.images for sample in samples]),
        texts=[sample.text for sample in samples],
        seeds=torch.tensor([sample.seed for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]),
        weights=torch.tensor([sample.weight for sample in samples]),
        keys=[sample.key for sample in samples],
        masks=masks,
        broken=broken,
        frames=torch.tensor([sample.frames for sample in samples]),
        scores=scores,
        noise_seeds=noise_seeds,
    )


def _stack(images: list[list[Pixels]]) -> Tensor:
    """Return all images as one tensor (B, K, 3, H, W); every pixel is copied once."""
    whole = np.empty((len(images), len(images[0]), *images[0][0].shape), dtype=np.uint8)
    for row, sides in zip(whole, images, strict=True):
        np.stack(sides, out=row)
    return torch.from_numpy(whole).permute(0, 1, 4, 2, 3)


def _decoded(side: ImageHeader, size: Size, *, draft: bool) -> Image.Image | Pixels:
    pixels = side.pixels() if side.size == size else None
    return side.decoded("RGB", size if draft else None) if pixels is None else pixels


@contextmanager
def _name_side(sample: Sample, name: str) -> Iterator[None]:
    """Put the names of sample and side before the message of a BrokenSample."""
    try:
        yield
    except BrokenSample as error:
        raise BrokenSample(f"{sample.name}: {name} {error}") from error


def _number(sample: StoredSample, name: str, default: float, most: float) -> float:
    value = sample.meta.get(name, default)
    if isinstance(value, int | float) and 0 <= value <= most:
        return float(value)
    raise BrokenSample(f"{sample.name} has a {name} in its .json that is no number up to {most}")
