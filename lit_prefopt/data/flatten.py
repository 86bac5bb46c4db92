"""Flatten decoded images: 8 bits per channel, and a plain colour behind transparent pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]

# Of PIL's raw modes of a png whose transparent colour is stored in other units than its pixels
KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


def flatten(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Convert a decoded image to one without transparency and with 8 bits per channel.

    Args:
        image: The image, in any mode of png, jpg and webp.
        background: Colour behind transparent pixels.
    """
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def is_transparent(image: Image.Image) -> bool:
    """Return whether a decoded image has a pixel that is not opaque.

    Args:
        image: The image, in any mode of png, jpg and webp.
    """
    if not image.has_transparency_data:
        return False
    image = _eight_bits(image)
    alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    return bool(np.asarray(alpha).min() < 255)


def scale_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour of an opened png to its pixels of 8 bits.

    PIL keeps it as stored, and then finds no pixel of it in grey of 2 or 4 bits or RGB of 16 bits.

    Args:
        image: A png whose pixels are not decoded yet.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    scale, key = KEY_SCALES.get(str(image.tile[0][3])), image.info.get("transparency")
    if scale is None or key is None:
        return
    grey = not isinstance(key, tuple)
    scaled = [int(value * scale) for value in ([key] if grey else key)]
    image.info["transparency"] = scaled[0] if grey else tuple(scaled)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits as 8 bits, which PIL's `convert` would clip instead of scaling."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))  # as PIL does with RGB of 16 bits
    key = image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
