"""Decoding and augmenting: from encoded bytes to tensors, the same way for all sides of a pair."""

from __future__ import annotations

import random
from collections.abc import Sequence
from io import BytesIO
from typing import IO, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lit_prefopt.batches import scaled
from lit_prefopt.utils.seeds import stable_seed

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # PIL's names, and ours for the files
MAX_SIDE = 16_384  # the longest side that webp and most encoders know
MAX_AREA = 64_000_000  # pixels; decoded, this is 192 MB


Size = tuple[int, int]  # width and height, as PIL has them
Pixels = NDArray[np.uint8]


class BrokenSample(ValueError):
    """A sample that cannot be used; another one stands in for it."""


class Crop(NamedTuple):
    """What happens to all images of one sample."""

    size: Size  # that every side is brought to
    corner: tuple[int, int]  # left and upper edge of what is cut out
    flip: bool


class AugmentDraws(NamedTuple):
    """All that is thrown for one sample, each in [0, 1)."""

    across: float  # place of a random crop
    down: float
    flip: float
    drop: float  # of the caption

    @classmethod
    def from_seed(cls, seed: int) -> AugmentDraws:
        """Return the coins of a sample's seed, whichever of them are looked at."""
        draws = random.Random(stable_seed("augment", seed))
        return cls(*(draws.random() for _ in range(4)))


class Augment(NamedTuple):
    """How the images and the text of a sample are prepared."""

    size: Size  # width and height of what comes out
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = 0.0
    draft: bool = False  # decode JPEGs no larger than they are needed

    def draw(self, size: Size, seed: int) -> tuple[Crop, bool]:
        """Return what to do with a sample whose best side has this size, and if its text drops.

        Args:
            size: Width and height of the best side.
            seed: The sample's seed.
        """
        across, down, flip, drop = AugmentDraws.from_seed(seed)
        if self.crop == "center":
            across = down = 0.5
        scale = max(self.size[0] / size[0], self.size[1] / size[1])
        width = max(self.size[0], round(size[0] * scale))
        height = max(self.size[1], round(size[1] * scale))
        corner = round(across * (width - self.size[0])), round(down * (height - self.size[1]))
        plan = Crop((width, height), corner, self.flip and flip < 0.5)
        return plan, drop < self.caption_dropout

    def frame(self, size: Size, crop: Crop) -> list[int]:
        """Return which part of which picture a side shows, as `batches.Prompt` says it.

        Args:
            size: Width and height of the side as it is stored.
            crop: What happens to it.
        """
        left, upper = crop.corner
        if crop.flip:  # the picture was mirrored and then cut: the edges change places
            left = crop.size[0] - self.size[0] - left
        return [size[1], size[0], upper, left, self.size[1], self.size[0]]

    def images(self, sides: Sequence[Image.Image], crop: Crop) -> Tensor:
        """Return the sides as (K, 3, H, W) uint8; in memory the channels lie together."""
        pixels = [self.pixels(side, sides[0].size, crop) for side in sides]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def mask(self, mask: Image.Image, size: Size, crop: Crop) -> Tensor:
        """Return the mask as (1, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self.pixels(mask, size, crop)[None] / np.float32(255))

    def pixels(self, image: Image.Image | Pixels, size: Size, crop: Crop) -> Pixels:
        """Return what is left of an image as (H, W, 3) or (H, W) uint8, to be read alone.

        Args:
            image: As PIL has it, or its pixels where it has the size of `crop` already.
            size: Width and height of the best side.
            crop: What happens to it.
        """
        if isinstance(image, np.ndarray):
            left, upper = crop.corner
            pixels = image[upper : upper + self.size[1], left : left + self.size[0]]
            return pixels[:, ::-1] if crop.flip else pixels
        bilinear = Image.Resampling.BILINEAR
        if image.size != size:  # as the best side's: fill the same frame, without distortion
            image = ImageOps.fit(image, crop.size, bilinear)
        elif image.size != crop.size:
            image = image.resize(crop.size, bilinear)
        left, upper = crop.corner
        if image.size != self.size:
            image = image.crop((left, upper, left + self.size[0], upper + self.size[1]))
        if crop.flip:
            image = ImageOps.mirror(image)
        return np.asarray(image)


def open_image(data: bytes | IO[bytes]) -> Image.Image:
    """Return an image whose header was looked at and whose pixels were not decoded yet.

    Args:
        data: The encoded image, or a file that holds it: png, jpg or webp.
    """
    file = BytesIO(data) if isinstance(data, bytes) else data
    try:
        image = Image.open(file, formats=tuple(FORMATS))
    except Image.DecompressionBombError as error:
        raise BrokenSample("is too large") from error
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        raise BrokenSample("is no png, jpg or webp image") from error
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise BrokenSample(f"is too large with {width} x {height} pixels")
    return image


def upright_size(data: bytes | IO[bytes]) -> Size:
    """Return the size that an image will have when it is decoded, from its header alone.

    Args:
        data: The encoded image, or a file that holds it.

    Returns:
        Width and height; (0, 0) for what is no usable image.
    """
    try:
        image = open_image(data)
        return _turned(image, image.size)
    except Exception:  # whatever PIL makes of a broken header or of broken EXIF data
        return 0, 0


def _turned(image: Image.Image, size: Size) -> Size:
    """Return a size with its sides exchanged, if the image is stored on its side."""
    return (size[1], size[0]) if _orientation(image) in (5, 6, 7, 8) else size


def _orientation(image: Image.Image) -> int:
    # the base class's: png's own decodes the pixels to find what may stand behind them
    found: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return found


class ImageHeader(NamedTuple):
    """An image whose header was read and whose pixels were not decoded yet."""

    data: bytes
    image: Image.Image
    size: Size  # upright

    @classmethod
    def read(cls, data: bytes) -> ImageHeader:
        """Read the header of a png, jpg or webp."""
        image = open_image(data)
        try:
            return cls(data, image, _turned(image, image.size))
        except Exception as error:  # PIL raises nearly anything on broken EXIF data
            raise BrokenSample(f"cannot be decoded ({error})") from error

    def pixels(self) -> Pixels | None:
        """Return the pixels (H, W, 3) of an upright RGB JPEG; None where `decoded` is to be asked.

        They are the same. PIL lays pixels out in a way of its own, and the way back from it takes
        a fourth of the time of decoding.
        """
        image = self.image
        if (image.format, image.mode) != ("JPEG", "RGB") or _orientation(image) != 1:
            return None
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(self.data)
            if (width, height) != self.size:
                return None
            found: Pixels = simplejpeg.decode_jpeg(self.data)
        except ValueError:  # PIL makes something of it, or says what is wrong
            return None
        return found

    def decoded(self, mode: Literal["RGB", "L"] = "RGB", least: Size | None = None) -> Image.Image:
        """Return the image, upright; for the arguments see `decode`."""
        image = self.image
        try:
            if least is not None:
                image.draft(None, _turned(image, least))
            image.load()
            # cameras store an orientation beside the pixels, and people judged the upright picture
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == mode else image.convert(mode)
        except Exception as error:
            raise BrokenSample(f"cannot be decoded ({error})") from error


def decode(
    data: bytes, mode: Literal["RGB", "L"] = "RGB", least: Size | None = None
) -> Image.Image:
    """Return a decoded image, upright.

    Args:
        data: The encoded image: png, jpg or webp.
        mode: RGB for images, L for masks.
        least: A size that suffices: a JPEG that is larger is decoded at a half, a quarter or an
            eighth of its own, no smaller than this, in a fraction of the time. Pixels are then
            means of 2 x 2, 4 x 4 or 8 x 8, instead of being weighed by the filter of `Augment`.
    """
    return ImageHeader.read(data).decoded(mode, least)


def from_pil(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) in [-1, 1]."""
    return scaled(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def to_pil(image: Tensor) -> Image.Image:
    """Return an image (3, H, W) in [-1, 1] as a PIL image."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
