"""Check an image without keeping its pixels: completeness, size and digest."""

from __future__ import annotations

import hashlib
import stat
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from lit_prefopt.data.flatten import Colour, flatten, is_transparent
from lit_prefopt.data.images import BrokenSample, open_image
from lit_prefopt.prepare.cells import ImageSource
from lit_prefopt.prepare.source_rows import MAX_BYTES

ORIENTATION = 0x0112  # the EXIF tag of the orientation
TURNED = (5, 6, 7, 8)  # its values for a quarter turn, which swaps width and height


class CheckedImage(NamedTuple):
    """An image that was fully decoded."""

    data: bytes
    size: tuple[int, int]  # width and height of the upright image
    digest: bytes  # 16 bytes, equal for equal files
    transparent: bool = False  # whether any pixel is, as stored in the source


def load_checked(picture: ImageSource, background: Colour | None = None) -> CheckedImage | str:
    """Load and check an image; return it, or an error message with its name.

    Args:
        picture: Where the image is.
        background: See `check`.
    """
    try:
        data = picture.data if picture.path is None else _read(picture)
        return check(data, background)
    except OSError as error:
        return f"{picture.name} cannot be read ({error.strerror})"
    except BrokenSample as error:
        return f"{picture.name} {error}"


def check(data: bytes, background: Colour | None = None) -> CheckedImage:
    """Decode an image fully, and return it with its size and digest.

    Args:
        data: The encoded image: png, jpg or webp.
        background: Colour on which a transparent image is stored; by default it stays unchanged.
    """
    image = open_image(data)
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
        # in draft mode (1/8 size, grey) a JPEG is still read to its last byte, a third cheaper
        image.draft("L", (1, 1))
        image.load()
        if image.format == "PNG":
            # verify the checksums, which decoding ignores, to detect damage as well as truncation
            open_image(data).verify()
        transparent = is_transparent(image)
        if transparent and background is not None:
            data = _on(image, background)
    except Exception as error:  # PIL's decoders raise many types for broken files
        raise BrokenSample(f"cannot be decoded ({error})") from error
    size = (height, width) if turned else (width, height)
    return CheckedImage(data, size, digest(data), transparent)


def _on(image: Image.Image, background: Colour) -> bytes:
    """Encode a transparent image on a plain colour as png, with its EXIF data."""
    buffer = BytesIO()
    flatten(image, background).save(buffer, "PNG", exif=image.getexif())
    return buffer.getvalue()


def digest(*parts: bytes) -> bytes:
    """Return a hash of 16 bytes over the parts, in this order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def _read(picture: ImageSource) -> bytes:
    assert picture.path is not None
    about = picture.path.stat()
    if not stat.S_ISREG(about.st_mode):  # reading a device would never end
        raise BrokenSample("is not a regular file")
    if about.st_size > MAX_BYTES:
        raise BrokenSample(f"is too large with {about.st_size} bytes")
    return picture.path.read_bytes()
