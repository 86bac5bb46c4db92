"""Images of the HTML report, as data URIs up to a total size."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MAX_BYTES = 24_000_000  # of all images of a page, in base64
SMALL = 128  # pixels; images up to this size are kept losslessly
LONGEST = 640  # pixels of the longer side of a larger one

Pictures = tuple[str | None, ...]  # data URIs of one row, or None without an image


def embed(
    files: Sequence[tuple[Path | None, ...]],
    differences: Sequence[float | None],
    max_bytes: int = MAX_BYTES,
) -> list[Pictures]:
    """Return the rows' images as data URIs, as many as fit.

    First come the best, the worst and an even spread of the rest, in turn, until the next row's
    pictures would not fit.

    Args:
        files: For each row, the models' images; None if there is none.
        differences: For each row, the policy's score minus the reference's.
        max_bytes: Size of all data URIs together.
    """
    result: list[Pictures] = [tuple(None for _ in row) for row in files]
    left = max_bytes
    for place in order_by_interest(differences):
        uris = tuple(_data_uri(file) if file else None for file in files[place])
        size = sum(len(uri) for uri in uris if uri)
        if size > left:
            break
        result[place], left = uris, left - size
    return result


def order_by_interest(differences: Sequence[float | None]) -> list[int]:
    """Return all row numbers ordered by interest: best, worst and one between, in turn.

    Args:
        differences: Score differences of the rows; rows without one come last.
    """
    known = [place for place, value in enumerate(differences) if value is not None]
    worst = sorted(known, key=lambda place: (differences[place], place))
    between = [worst[rank] for rank in _spread(len(worst))]
    turns = (place for turn in zip(worst[::-1], worst, between, strict=True) for place in turn)
    missing = (place for place, value in enumerate(differences) if value is None)
    return list(dict.fromkeys([*turns, *missing]))


def _spread(count: int) -> Iterator[int]:
    """Yield 0 to count - 1 in an order of which any prefix is evenly spread."""
    bits = max(count - 1, 0).bit_length()
    for step in range(1 << bits):
        flipped = int(f"{step:0{bits}b}"[::-1], 2) if bits else 0
        if flipped < count:
            yield flipped


def _data_uri(path: Path) -> str | None:
    """Encode an image without its metadata, or return None if it cannot be read.

    Small ones stay exact, larger ones become WebP.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    stream = io.BytesIO()
    if max(picture.size) <= SMALL:
        clean = Image.fromarray(np.asarray(picture))
        clean.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        picture.save(stream, "WEBP", quality=82, method=3, exif=b"")
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
