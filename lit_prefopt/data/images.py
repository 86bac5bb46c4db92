"""Decode and augment images, in the same way for all sides of a pair.

torch is imported lazily: commands that only check files do not need it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from io import BytesIO
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from lit_prefopt.data.flatten import BLACK, WHITE, flatten, scale_transparent_colour
from lit_prefopt.utils.seeds import stable_seed

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # PIL's names, and our file extensions
JPEG = b"\xff\xd8\xff"
MAX_SIDE = 16_384  # the longest side that WebP and most encoders support
MAX_AREA = 64_000_000  # pixels, decoded or after resizing; this is 192 MB

# PIL's limit of 1 MiB for one text or colour profile of a png refuses pictures of image editors;
# its limit for all texts of a picture, 64 MiB, remains
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

Size = tuple[int, int]  # width and height, as in PIL
Pixels = NDArray[np.uint8]


class BrokenSample(ValueError):
    """A sample that cannot be used; training replaces it by another one."""


class Crop(NamedTuple):
    """Resize and crop of all images of one sample."""

    size: Size  # to which every side is resized
    corner: tuple[int, int]  # left and upper edge of the crop
    flip: bool


class AugmentDraws(NamedTuple):
    """Random draws of one sample, each in [0, 1)."""

    across: float  # horizontal position of a random crop
    down: float
    flip: float
    drop: float  # of the caption

    @classmethod
    def from_seed(cls, seed: int) -> AugmentDraws:
        """Return all draws of a sample's seed, whether used or not."""
        draws = random.Random(stable_seed("augment", seed))
        return cls(*(draws.random() for _ in range(4)))


class Augment(NamedTuple):
    """Augmentation of the images and the text of a sample."""

    size: Size  # width and height of the output
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = 0.0
    draft: bool = False  # decode JPEGs at a reduced size if that suffices

    def draw(self, size: Size, seed: int) -> tuple[Crop, bool]:
        """Return the crop of a sample whose best side has this size, and whether to drop its text.

        Args:
            size: Width and height of the best side.
            seed: The sample's seed.

        Raises:
            BrokenSample: The side is so long and narrow that resizing would need too much memory.
        """
        across, down, flip, drop = AugmentDraws.from_seed(seed)
        if self.crop == "center":
            across = down = 0.5
        scale = max(self.size[0] / size[0], self.size[1] / size[1])
        width = max(self.size[0], round(size[0] * scale))
        height = max(self.size[1], round(size[1] * scale))
        if width * height > MAX_AREA:
            raise BrokenSample(
                f"is too long and narrow with {size[0]} x {size[1]} pixels: filling "
                f"{self.size[0]} x {self.size[1]} would enlarge it to {width} x {height}"
            )
        corner = round(across * (width - self.size[0])), round(down * (height - self.size[1]))
        plan = Crop((width, height), corner, self.flip and flip < 0.5)
        return plan, drop < self.caption_dropout

    def frame(self, size: Size, crop: Crop) -> list[int]:
        """Return the original size and crop of a side, as in `batches.Prompt`.

        Args:
            size: Width and height of the stored side.
            crop: Its crop.
        """
        left, upper = crop.corner
        if crop.flip:  # mirrored before the crop, which swaps the edges
            left = crop.size[0] - self.size[0] - left
        return [size[1], size[0], upper, left, self.size[1], self.size[0]]

    def images(self, sides: Sequence[Image.Image], crop: Crop) -> Tensor:
        """Return the sides as (K, 3, H, W) uint8 in channels-last memory format."""
        import torch

        pixels = [self.pixels(side, sides[0].size, crop) for side in sides]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def mask(self, mask: Image.Image, size: Size, crop: Crop) -> Tensor:
        """Return the mask as (1, H, W) float32 in [0, 1]."""
        import torch

        return torch.from_numpy(self.pixels(mask, size, crop)[None] / np.float32(255))

    def pixels(self, image: Image.Image | Pixels, size: Size, crop: Crop) -> Pixels:
        """Resize and crop an image to (H, W, 3) or (H, W) uint8, read-only.

        Args:
            image: A PIL image, or pixels that already have the size of `crop`.
            size: Width and height of the best side.
            crop: Its crop.
        """
        if isinstance(image, np.ndarray):
            left, upper = crop.corner
            pixels = image[upper : upper + self.size[1], left : left + self.size[0]]
            return pixels[:, ::-1] if crop.flip else pixels
        bilinear = Image.Resampling.BILINEAR
        if image.size != size:  # fill the best side's frame without distortion
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
    """Open an image lazily: the header is read, the pixels are not decoded.

    Args:
        data: The encoded image, or its file: png, jpg or webp.
    """
    file = BytesIO(data) if isinstance(data, bytes) else data
    try:
        image = _opened(file)
    except Image.DecompressionBombError as error:
        raise BrokenSample("is too large") from error
    except (UnidentifiedImageError, SyntaxError) as error:  # PIL's own for a wrong header
        raise BrokenSample("is not a png, jpg or webp image") from error
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        raise BrokenSample(f"cannot be decoded ({error})") from error
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise BrokenSample(f"is too large with {width} x {height} pixels")
    return image


def _opened(file: IO[bytes]) -> Image.Image:
    start = file.read(len(JPEG))
    file.seek(0)
    if start == JPEG:
        # the first picture only: `Image.open` returns another format, MPO, for the photographs of
        # many phones, which hold a preview or a depth map as well
        return JpegImageFile(file)
    image = Image.open(file, formats=tuple(FORMATS))
    if image.format == "PNG":
        scale_transparent_colour(image)
    return image


def upright_size(data: bytes | IO[bytes]) -> Size:
    """Return the size of a decoded, upright image, reading only its header.

    Args:
        data: The encoded image, or its file.

    Returns:
        Width and height; (0, 0) for an unusable image.
    """
    try:
        image = open_image(data)
        return _turned(image, image.size)
    except Exception:  # PIL raises many types for broken headers and EXIF data
        return 0, 0


def _turned(image: Image.Image, size: Size) -> Size:
    """Return a size with width and height swapped, if EXIF has a quarter turn."""
    return (size[1], size[0]) if _orientation(image) in (5, 6, 7, 8) else size


def _orientation(image: Image.Image) -> int:
    # the base class's method: png's own decodes the pixels to find later chunks
    found: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return found


class ImageHeader(NamedTuple):
    """An opened image with its size, whose pixels are not decoded yet."""

    data: bytes
    image: Image.Image
    size: Size  # upright

    @classmethod
    def read(cls, data: bytes) -> ImageHeader:
        """Read the header of a png, jpg or webp."""
        image = open_image(data)
        try:
            return cls(data, image, _turned(image, image.size))
        except Exception as error:  # PIL raises many types for broken EXIF data
            raise BrokenSample(f"cannot be decoded ({error})") from error

    def pixels(self) -> Pixels | None:
        """Decode the pixels (H, W, 3) of an upright RGB JPEG; return None for other images.

        They equal those of `decoded`. PIL has an internal pixel layout, and the conversion from it
        takes a fourth of the time of decoding.
        """
        image = self.image
        if (image.format, image.mode) != ("JPEG", "RGB") or _orientation(image) != 1:
            return None
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(self.data)
            if (width, height) != self.size:
                return None
            found: Pixels = simplejpeg.decode_jpeg(self.data)
        except ValueError:  # PIL decodes it, or raises the error
            return None
        return found

    def decoded(self, mode: Literal["RGB", "L"] = "RGB", least: Size | None = None) -> Image.Image:
        """Decode the image upright and flattened; for the arguments see `decode`."""
        image = self.image
        try:
            if least is not None:
                image.draft(None, _turned(image, least))
            image.load()
            # annotators saw the image with its EXIF orientation applied
            ImageOps.exif_transpose(image, in_place=True)
            image = flatten(image, WHITE if mode == "RGB" else BLACK)
            return image if image.mode == mode else image.convert(mode)
        except Exception as error:
            raise BrokenSample(f"cannot be decoded ({error})") from error


def decode(
    data: bytes, mode: Literal["RGB", "L"] = "RGB", least: Size | None = None
) -> Image.Image:
    """Decode an image upright; transparent pixels are shown on white, those of a mask on black.

    Args:
        data: The encoded image: png, jpg or webp.
        mode: RGB for images, L for masks.
        least: Minimum size: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but no
            smaller than this, in a fraction of the time. Pixels are then means of 2 x 2, 4 x 4 or
            8 x 8, instead of the filter of `Augment`.
    """
    return ImageHeader.read(data).decoded(mode, least)


def from_pil(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor (3, H, W) in [-1, 1]."""
    import torch

    from lit_prefopt.batches import scaled

    return scaled(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to a PIL image."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
