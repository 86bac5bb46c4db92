"""One sample of a batch, from stored bytes to tensors, and the batch that several make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_prefopt.batches import ImagePairs
from lit_prefopt.data.images import Augment, BrokenSample, ImageHeader, Pixels, Size, decode
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.utils.seeds import sample_seed

GiveRoom = Callable[[int], NDArray[np.uint8]]
"""Returns memory for so many bytes."""


def own_room(size: int) -> NDArray[np.uint8]:
    """Return memory for so many bytes."""
    return np.empty(size, dtype=np.uint8)


class Visit(NamedTuple):
    """One sample's turn in an epoch."""

    epoch: int
    position: int  # in the epoch's order
    bucket: int  # of the position
    shard: int  # where the sample is stored; for a stand-in its own place, not the position's
    sample: int


class Items(Protocol):
    """Makes the samples of a batch, each by itself, and the batch."""

    @property
    def reader(self) -> ShardReader:
        """Reads a sample by (shard number, sample number)."""
        ...

    def item(self, visit: Visit) -> Any:
        """Return a sample; raise BrokenSample, which names it, if it cannot be used."""
        ...

    def collate(self, items: list[Any], broken: tuple[str, ...], room: GiveRoom) -> Any:
        """Return the batch that these items make.

        Args:
            items: The samples.
            broken: Names of those they stand in for.
            room: Gives memory for what is large.
        """
        ...


class Item(NamedTuple):
    """One sample of a batch."""

    images: list[Pixels]  # K sides (H, W, 3)
    text: str
    seed: int
    label: float
    weight: float
    key: str
    mask: Tensor | None  # (1, H, W)
    frames: list[list[int]]  # (K, 6)


class ImageItems:
    """Images, decoded and augmented.

    Args:
        reader: Reads a sample by (shard number, sample number).
        seed: Seed of the run.
        augments: What happens to images and text, for each bucket.
    """

    def __init__(self, reader: ShardReader, seed: int, augments: Sequence[Augment]) -> None:
        self.reader, self.seed, self.augments = reader, seed, augments

    def item(self, visit: Visit) -> Item:
        """Return a sample, brought to the shape of its position's bucket."""
        seed = sample_seed(self.seed, visit.epoch, visit.position)
        stored = self.reader(visit.shard, visit.sample)
        return load_sample(stored, self.augments[visit.bucket], seed, self.reader.sides)

    def collate(self, items: list[Item], broken: tuple[str, ...], room: GiveRoom) -> ImagePairs:
        """Return the batch that these items make."""
        return collate(items, broken, room)


def load_sample(sample: Sample, augment: Augment, seed: int, names: Sequence[str]) -> Item:
    """Return a sample decoded and augmented; raise BrokenSample, which names it, if it cannot be.

    Args:
        sample: The sample as stored.
        augment: What happens to it.
        seed: The sample's seed.
        names: Names of its sides, for messages.
    """
    text = prompt_of(sample)
    sides: list[ImageHeader] = []
    for name, data in zip(names, sample.sides, strict=True):
        with _of(sample, name):
            sides.append(ImageHeader.read(data))
    crop, dropped = augment.draw(sides[0].size, seed)
    images: list[Image.Image | Pixels] = []
    for name, side in zip(names, sides, strict=True):
        with _of(sample, name):
            images.append(_decoded(side, crop.size, draft=augment.draft))
    best = images[0].size if isinstance(images[0], Image.Image) else crop.size
    mask = None
    if sample.mask is not None:
        with _of(sample, "mask"):
            mask = augment.mask(decode(sample.mask, "L"), sides[0].size, crop)
    return Item(
        images=[augment.pixels(image, best, crop) for image in images],
        text="" if dropped else text,
        seed=seed,
        label=label_of(sample),
        weight=weight_of(sample),
        key=sample.name,
        mask=mask,
        frames=[augment.frame(side.size, crop) for side in sides],
    )


class Described(Protocol):
    """A stored sample of whatever kind."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def text(self) -> str:
        """The prompt."""
        ...

    @property
    def meta(self) -> dict[str, Any]:
        """What its .json says."""
        ...


def label_of(sample: Described) -> float:
    """Return the probability that the first side is the better one; 1 where it is not said."""
    return _number(sample, "label", 1.0, most=1.0)


def weight_of(sample: Described) -> float:
    """Return the factor of the pair's loss; 1 where it is not said."""
    return _number(sample, "weight", 1.0, most=float("inf"))


def prompt_of(sample: Described) -> str:
    """Return the prompt of a sample; raise BrokenSample if it is empty."""
    if not sample.text.strip():
        raise BrokenSample(
            f"{sample.name} has an empty prompt (.txt): write one, or leave the pair out; to train "
            "without prompts is what `caption_dropout` is for"
        )
    return sample.text


def collate(
    items: list[Item], broken: tuple[str, ...] = (), room: GiveRoom = own_room
) -> ImagePairs:
    """Return the batch that these items make; for the arguments see `Items`."""
    masks = None
    if any(item.mask is not None for item in items):  # where there is none, all may differ
        all_ones = torch.ones(1, *items[0].images[0].shape[:2])
        masks = torch.stack([all_ones if i.mask is None else i.mask for i in items])
    return ImagePairs(
        images=_stacked([item.images for item in items], room),
        texts=[item.text for item in items],
        seeds=torch.tensor([item.seed for item in items]),
        labels=torch.tensor([item.label for item in items]),
        weights=torch.tensor([item.weight for item in items]),
        keys=[item.key for item in items],
        masks=masks,
        broken=broken,
        frames=torch.tensor([item.frames for item in items]),
    )


def _stacked(images: list[list[Pixels]], room: GiveRoom) -> Tensor:
    """Return all in one, (B, K, 3, H, W); every pixel is copied once."""
    shape = len(images), len(images[0]), *images[0][0].shape
    whole = room(math.prod(shape)).reshape(shape)
    for row, sides in zip(whole, images, strict=True):
        np.stack(sides, out=row)
    return torch.from_numpy(whole).permute(0, 1, 4, 2, 3)


def _decoded(side: ImageHeader, size: Size, *, draft: bool) -> Image.Image | Pixels:
    pixels = side.pixels() if side.size == size else None
    return side.decoded("RGB", size if draft else None) if pixels is None else pixels


@contextmanager
def _of(sample: Sample, name: str) -> Iterator[None]:
    """Say whose image it is that cannot be used."""
    try:
        yield
    except BrokenSample as error:
        raise BrokenSample(f"{sample.name}: {name} {error}") from error


def _number(sample: Described, name: str, default: float, most: float) -> float:
    value = sample.meta.get(name, default)
    if isinstance(value, int | float) and 0 <= value <= most:
        return float(value)
    raise BrokenSample(f"{sample.name} has a {name} in its .json that is no number up to {most}")
