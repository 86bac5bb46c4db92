"""Looking at an image without keeping its pixels: is it whole, how large is it, which one is it?"""

from __future__ import annotations

import hashlib
import stat
from typing import NamedTuple

from lit_prefopt.data.images import BrokenSample, open_image
from lit_prefopt.prepare.records import ImageSource
from lit_prefopt.prepare.source_rows import MAX_BYTES

ORIENTATION = 0x0112  # the tag of a photo that says how it was held
TURNED = (5, 6, 7, 8)  # its values for a quarter turn: width and height change places


class CheckedImage(NamedTuple):
    """An image that can be decoded to its end."""

    data: bytes
    size: tuple[int, int]  # width and height of the upright picture
    digest: bytes  # 16 bytes, the same for the same file


def load_checked(picture: ImageSource) -> CheckedImage | str:
    """Return a checked image, or a sentence that names it and says what is wrong."""
    try:
        data = picture.data if picture.path is None else _read(picture)
        return check(data)
    except OSError as error:
        return f"{picture.name} cannot be read ({error.strerror})"
    except BrokenSample as error:
        return f"{picture.name} {error}"


def check(data: bytes) -> CheckedImage:
    """Return an image's size and digest after it was decoded to its end.

    Args:
        data: The encoded image: png, jpg or webp.
    """
    image = open_image(data)
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
        # a jpg is read to its last byte also for an eighth of its size in grey, a third cheaper
        image.draft("L", (1, 1))
        image.load()
        if image.format == "PNG":
            # its checksums, which decoding passes over: damage shows, not only what is missing
            open_image(data).verify()
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        raise BrokenSample(f"cannot be decoded ({error})") from error
    size = (height, width) if turned else (width, height)
    return CheckedImage(data, size, digest(data))


def digest(*parts: bytes) -> bytes:
    """Return 16 bytes that stand for these parts, in this order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def _read(picture: ImageSource) -> bytes:
    assert picture.path is not None
    about = picture.path.stat()
    if not stat.S_ISREG(about.st_mode):  # a device would never end
        raise BrokenSample("is no file")
    if about.st_size > MAX_BYTES:
        raise BrokenSample(f"is too large with {about.st_size} bytes")
    return picture.path.read_bytes()
