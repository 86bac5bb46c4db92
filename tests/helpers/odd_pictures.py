"""Odd pictures: damaged, extreme, rare or hostile ones."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from tests.helpers.shards import picture
from tests.helpers.spoil import spoil_bytes

START = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a png, with a checksum that agrees."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colours: int, rows: bytes, more: bytes = b"") -> bytes:
    """Return a png of any header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows))
    return START + body + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """Return an encoded image."""
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def extreme(draws: random.Random) -> bytes:
    """Return a picture of an extreme size or aspect."""
    size = draws.choice([(1, 1), (1, 16_384), (16_384, 1), (16_385, 1), (8000, 8000), (3, 9000)])
    if draws.random() < 0.5:
        return saved(Image.new("L", size), "PNG")
    return saved(Image.new("RGB", size), "JPEG")


def false_header(draws: random.Random) -> bytes:
    """Return a png whose header claims another size, depth or colour type."""
    sizes = [0, 1, 2, 20, 70_000, 2**31 - 1, 2**32 - 1]
    width, height = draws.choice(sizes), draws.choice(sizes)
    depth, colours = draws.choice([0, 1, 2, 4, 8, 16, 32]), draws.randrange(8)
    return png(width, height, depth, colours, bytes(draws.choice([0, 10, 100_000])))


def chunks(draws: random.Random) -> bytes:
    """Return a png with a chunk that is odd, large or in the wrong place."""
    text = zlib.compress(bytes(draws.choice([10, 3 << 20, 80 << 20])))
    more = draws.choice(
        [
            chunk(b"zTXt", b"k\0\0" + text),
            chunk(b"iCCP", b"k\0\0" + text),
            chunk(b"iTXt", b"k\0\1\0\0\0" + text),
            chunk(b"tRNS", draws.randbytes(draws.randrange(9))),
            chunk(b"PLTE", draws.randbytes(draws.randrange(900))),
            chunk(b"eXIf", draws.randbytes(draws.randrange(200))),
            chunk(b"acTL", struct.pack(">II", 2**31, 0)),
            chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)),
            chunk(b"IEND", b""),
            b"\xff\xff\xff\xffzTXt",
        ]
    )
    colours, width = draws.choice([(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)])
    return png(6, 5, 8, colours, bytes(5 * (1 + 6 * width)), more)


def modes(draws: random.Random) -> bytes:
    """Return a picture of a rare mode or format, usable or not."""
    grey = Image.fromarray(np.uint16(np.arange(400).reshape(20, 20) * 160))
    preview, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    makers: list[Callable[[], bytes]] = [
        lambda: saved(grey, "PNG"),
        lambda: saved(Image.new("RGBA", (20, 20), (9, 9, 9, 0)), "PNG"),
        lambda: saved(Image.new("LA", (20, 20), (9, 0)), "PNG"),
        lambda: saved(Image.new("1", (20, 20)), "PNG"),
        lambda: saved(Image.new("P", (20, 20)), "PNG", transparency=0),
        lambda: saved(Image.new("CMYK", (20, 20)), "JPEG"),
        lambda: saved(Image.new("RGBA", (20, 20), (9, 9, 9, 9)), "WEBP", lossless=True),
        lambda: saved(preview, "MPO", save_all=True, append_images=[preview]),
        lambda: saved(preview, "PNG", save_all=True, append_images=[other]),
        lambda: saved(preview, "WEBP", save_all=True, append_images=[other]),
        lambda: saved(Image.new("F", (20, 20)), "TIFF"),
        lambda: saved(preview, "GIF"),
        lambda: saved(preview, "BMP"),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ]
    return draws.choice(makers)()


def damaged(draws: random.Random) -> bytes:
    """Return a picture of which some bytes are spoilt."""
    size = draws.choice([(20, 16), (64, 64), (130, 70)])
    noise = np.random.RandomState(draws.randrange(99)).randint(0, 255, (*size[::-1], 3))
    image = Image.fromarray(noise.astype(np.uint8))
    several = {"save_all": True, "append_images": [image]}
    form, options = draws.choice(
        [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("MPO", several)]
    )
    return spoil_bytes(saved(image, form, **options), draws)


def odd_picture(draws: random.Random) -> bytes:
    """Return an odd picture."""
    empty: Callable[[random.Random], bytes] = lambda _: b""  # noqa: E731
    plain: Callable[[random.Random], bytes] = lambda _: picture(77, (30, 30))  # noqa: E731
    makers = [damaged, damaged, damaged, extreme, false_header, chunks, chunks, modes, empty, plain]
    return draws.choice(makers)(draws)
