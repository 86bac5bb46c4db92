"""Every colour mode of a png is shown as viewers show it: scaled to 8 bits, on a plain colour."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lit_prefopt.data.flatten import flatten, is_transparent
from lit_prefopt.data.images import BrokenSample, ImageHeader, decode, upright_size

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # a png's colour types


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, colours: int, row: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a png of one row with two pixels."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, colours, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    whole = chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def key(*values: int) -> bytes:
    """Return the chunk that makes one colour transparent."""
    return chunk(b"tRNS", words(*values))


COLOURS = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "first", "second"),
    [
        (png(16, GREY, words(0x8000, 0x40FF)), [128] * 3, [64] * 3),
        (png(16, GREY, words(0x8000, 0x8001), key(0x8000)), WHITE, [128] * 3),
        (png(16, RGB, words(0x8000, 0, 0, 0, 0xFFFF, 0)), [128, 0, 0], [0, 255, 0]),
        (png(16, RGB, words(0x8000, 0, 0, 0, 0, 9), key(0x8000, 0, 0)), WHITE, [0, 0, 0]),
        (png(16, GREY_ALPHA, words(0x8000, 0xFFFF, 0x8000, 0)), [128] * 3, WHITE),
        (png(16, RGB_ALPHA, words(0, 0, 0x8000, 0xFFFF, 0, 0, 0, 0)), [0, 0, 128], WHITE),
        (png(8, GREY, bytes([7, 8]), key(7)), WHITE, [8] * 3),
        (png(4, GREY, bytes([0x1F]), key(1)), WHITE, [255] * 3),
        (png(2, GREY, bytes([0b01_10_0000]), key(2)), [85] * 3, WHITE),
        (png(1, GREY, bytes([0b01_000000])), [0] * 3, [255] * 3),
        (png(1, GREY, bytes([0b01_000000]), key(0)), WHITE, [255] * 3),
        (png(8, RGB, bytes([1, 2, 3, 4, 5, 6]), key(1, 2, 3)), WHITE, [4, 5, 6]),
        (png(8, PALETTE, bytes([0, 1]), COLOURS), [10, 20, 30], [40, 50, 60]),
        (
            png(8, PALETTE, bytes([0, 1]), COLOURS + chunk(b"tRNS", b"\0\x80")),
            WHITE,
            [147, 152, 157],  # half of 40, 50, 60 and half of white
        ),
        (png(8, GREY_ALPHA, bytes([100, 255, 100, 127])), [100] * 3, [178] * 3),
        (png(8, RGB_ALPHA, bytes([9, 8, 7, 255, 9, 8, 7, 0])), [9, 8, 7], WHITE),
    ],
)
def test_every_colour_mode_of_png(data: bytes, first: list[int], second: list[int]):
    [[left, right]] = np.asarray(decode(data)).astype(int).tolist()
    assert np.abs(np.subtract([left, right], [first, second])).max() <= 1
    keyed, alpha = b"tRNS" in data, data[25] in (GREY_ALPHA, RGB_ALPHA)
    assert is_transparent(loaded(data)) == (keyed or alpha)


def loaded(data: bytes) -> Image.Image:
    image = ImageHeader.read(data).image
    image.load()
    return image


def test_opaque_alpha_is_not_transparent_and_changes_no_pixel():
    pixels = np.random.RandomState(0).randint(0, 256, (9, 7, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    image = Image.fromarray(pixels)
    assert not is_transparent(image)
    np.testing.assert_array_equal(np.asarray(flatten(image)), pixels[..., :3])


def test_transparency_takes_the_background_given():
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 0))
    assert flatten(image, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert image.mode == "RGBA"


def test_transparent_parts_of_a_mask_count_as_black():
    buffer = BytesIO()
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (255, 255, 255, 0))
    mask.save(buffer, "PNG")
    assert np.asarray(decode(buffer.getvalue(), "L")).tolist() == [[255, 0]]


def test_a_mask_of_16_bits_keeps_its_greys():
    mask = decode(png(16, GREY, words(0x8000, 0x40FF)), "L")
    assert (mask.mode, np.asarray(mask).tolist()) == ("L", [[128, 64]])


def test_a_turned_image_of_16_bits_comes_out_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    Image.fromarray(np.uint16([[0, 0x8000, 0xFFFF]])).save(buffer, "PNG", exif=exif)
    assert np.asarray(decode(buffer.getvalue()).convert("L")).tolist() == [[0], [128], [255]]


LONG_TEXT = zlib.compress(b"workflow" * (1 << 18))  # 2 MiB


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"prompt\0\0" + LONG_TEXT),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + LONG_TEXT),
        chunk(b"iCCP", b"profile\0\0" + LONG_TEXT),
        chunk(b"tEXt", b"prompt\0" + b"workflow" * (1 << 18)),
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt"],
)
def test_a_long_text_beside_the_pixels_does_not_matter(text: bytes, place: str):
    data = png(8, GREY, bytes([7, 200]), **{place: text})
    assert np.asarray(decode(data).convert("L")).tolist() == [[7, 200]]


def test_texts_beyond_all_bounds_are_refused():
    bomb = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(65 << 20)))
    data = png(8, GREY, bytes([7, 200]), bomb)
    with pytest.raises(BrokenSample, match="cannot be decoded .*too large"):
        decode(data)
    assert upright_size(data) == (0, 0)


def phone_picture(size: tuple[int, int] = (40, 24)) -> tuple[bytes, bytes]:
    """Return a JPEG with a second picture, as phones write it, and the same without."""
    pixels = np.random.RandomState(2).randint(0, 255, (*size[::-1], 3)).astype(np.uint8)
    preview, image = Image.new("RGB", (8, 8), "red"), Image.fromarray(pixels)
    several, one = BytesIO(), BytesIO()
    image.save(several, "MPO", save_all=True, append_images=[preview])
    image.save(one, "JPEG")
    assert Image.open(several).format == "MPO"
    return several.getvalue(), one.getvalue()


@pytest.mark.parametrize("least", [None, (10, 6)])
def test_the_first_picture_of_a_phones_jpeg_counts(least: tuple[int, int] | None):
    several, one = phone_picture()
    assert upright_size(several) == (40, 24)
    np.testing.assert_array_equal(
        np.asarray(decode(several, least=least)), np.asarray(decode(one, least=least))
    )
    np.testing.assert_array_equal(ImageHeader.read(several).pixels(), np.asarray(decode(one)))


def test_a_damaged_list_of_further_pictures_does_not_matter():
    several, one = phone_picture()
    at = several.index(b"MPF\0") + 4
    damaged = several[:at] + b"\xff" * 20 + several[at + 20 :]
    np.testing.assert_array_equal(np.asarray(decode(damaged)), np.asarray(decode(one)))
