"""Decoding refuses before it decodes; augmentation is the same for all sides."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from lit_prefopt.batches import scaled
from lit_prefopt.data import images
from lit_prefopt.data.images import (
    Augment,
    BrokenSample,
    ImageHeader,
    decode,
    open_image,
    upright_size,
)
from lit_prefopt.data.loading.image_samples import load_sample
from lit_prefopt.data.shards.reader import Sample
from tests.helpers.shards import picture, png_header


def ramp(size: tuple[int, int]) -> Image.Image:
    """Return an image whose red runs to the right and whose green runs down."""
    across = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0)
    down = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_known_formats_come_out_as_rgb(form: str):
    image = decode(picture(200, form=form))
    assert image.mode == "RGB"
    assert abs(image.getpixel((2, 5))[0] - 200) < 6


@pytest.mark.parametrize("size", [(1_000_000, 64), (64, 1_000_000), (9_000, 9_000)])
def test_giants_are_refused_before_decoding(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BrokenSample, match="too large"):
        decode(png_header(*size))


def test_the_limits_are_limits():
    assert open_image(png_header(images.MAX_SIDE, 10)).size == (images.MAX_SIDE, 10)
    with pytest.raises(BrokenSample, match="too large with 16385 x 10 pixels"):
        open_image(png_header(images.MAX_SIDE + 1, 10))


@pytest.mark.parametrize("size", [(16_384, 1), (1, 16_384), (16_384, 60)])
def test_a_side_that_would_become_huge_is_refused_before_it_is_resized(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized"))
    data = picture(1, size)
    sample = Sample("a.tar/1", "text", [data, picture(2)], None, {})
    with pytest.raises(BrokenSample, match="chosen is too long and narrow with .* would enlarge"):
        load_sample(sample, Augment((512, 512)), 1)


def test_what_resizing_makes_is_bounded_and_the_other_side_may_be_of_any_shape():
    augment = Augment((512, 512))
    crop, _ = augment.draw((16_384, 70), 1)
    assert images.MAX_AREA / 2 < crop.size[0] * crop.size[1] <= images.MAX_AREA
    sample = Sample("a.tar/1", "text", [picture(1), picture(2, (16_384, 1))], None, {})
    assert [side.shape for side in load_sample(sample, augment, 1).images] == [
        (512, 512, 3),
        (512, 512, 3),
    ]


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(form: str):
    with pytest.raises(BrokenSample, match="not a png, jpg or webp"):
        decode(picture(1, form=form))


def test_what_is_no_image_or_half_of_one_is_refused():
    with pytest.raises(BrokenSample, match="not a png, jpg or webp"):
        decode(b"GIF89a or so")
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    with pytest.raises(BrokenSample, match="cannot be decoded"):
        decode(buffer.getvalue()[:4000])


def test_a_rotated_photograph_comes_out_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    buffer = BytesIO()
    ramp((20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (10, 20)


def test_all_sides_and_the_mask_get_the_same_crop_and_flip():
    augment = Augment((16, 16), crop="random", flip=True)
    image = ramp((40, 24))
    seen = set()
    for seed in range(30):
        crop, _ = augment.draw(image.size, seed)
        sides = augment.images([image, image.copy(), image.copy()], crop)
        assert sides.shape == (3, 3, 16, 16)
        assert sides.dtype == torch.uint8
        assert torch.equal(sides[0], sides[1])
        assert torch.equal(sides[0], sides[2])
        mask = augment.mask(image.getchannel("R"), image.size, crop)
        assert torch.allclose(mask, sides[0, :1] / 255, atol=1e-6)
        seen.add((crop.corner, crop.flip))
    assert len({flip for _, flip in seen}) == 2
    assert len({corner for corner, _ in seen}) > 5


def test_sides_of_unequal_size_show_the_same_place():
    augment = Augment((32, 32), crop="random", flip=True)
    for seed in range(5):
        crop, _ = augment.draw((96, 64), seed)
        small_and_large = augment.images([ramp((96, 64)), ramp((192, 128)), ramp((48, 32))], crop)
        assert (small_and_large[0].int() - small_and_large[1:].int()).abs().max() < 10


def test_the_centre_is_cut_and_scaled_values_span_minus_one_to_one():
    crop, _ = Augment((10, 10)).draw((30, 10), seed=1)
    assert crop == ((30, 10), (10, 0), False)
    black_and_white = [Image.new("RGB", (30, 10), c) for c in ("black", "white")]
    out = scaled(Augment((10, 10)).images(black_and_white, crop))
    assert (out.dtype, out.is_contiguous()) == (torch.float32, True)
    assert (out[0] == -1).all()
    assert (out[1] == 1).all()


def test_flips_and_dropout_come_at_their_rates_and_do_not_disturb_each_other():
    augment = Augment((8, 8), "random", flip=True, caption_dropout=0.2)
    draws = [augment.draw((20, 8), seed) for seed in range(2000)]
    assert abs(sum(crop.flip for crop, _ in draws) / 2000 - 0.5) < 0.04
    assert abs(sum(drop for _, drop in draws) / 2000 - 0.2) < 0.03
    without = [augment._replace(caption_dropout=0.0).draw((20, 8), seed) for seed in range(2000)]
    assert [crop for crop, _ in draws] == [crop for crop, _ in without]
    assert not any(drop for _, drop in without)


@pytest.mark.parametrize("target", [(16, 16), (24, 16), (16, 32)])
def test_a_frame_says_what_is_seen_of_the_mirrored_picture(target: tuple[int, int]):
    augment = Augment(target, crop="random", flip=True)
    image = ramp((40, 24))
    flipped = set()
    for seed in range(20):
        crop, _ = augment.draw(image.size, seed)
        height, width, top, left, *cut = augment.frame(image.size, crop)
        assert ((width, height), cut) == ((40, 24), [target[1], target[0]])
        whole = image.resize(crop.size, Image.Resampling.BILINEAR)
        whole = ImageOps.mirror(whole) if crop.flip else whole
        seen = whole.crop((left, top, left + target[0], top + target[1]))
        [shown] = augment.images([image], crop)
        assert (np.asarray(seen) == shown.permute(1, 2, 0).numpy()).all()
        flipped.add(crop.flip)
    assert flipped == {False, True}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_headers_tell_the_upright_size(form: str, orientation: int | None):
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = BytesIO()
    ramp((20, 10)).save(buffer, form, exif=exif)
    assert upright_size(buffer.getvalue()) == decode(buffer.getvalue()).size
    assert upright_size(buffer.getvalue()) == ((10, 20) if orientation in (6, 8) else (20, 10))


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("least", "seen"),
    [
        ((400, 200), (400, 200)),
        ((201, 101), (400, 200)),
        ((200, 100), (200, 100)),
        ((40, 25), (50, 25)),
    ],
)
def test_a_draft_is_no_smaller_than_what_is_needed(least, seen, orientation: int):
    image = ramp((400, 200)) if orientation == 1 else ramp((200, 400))
    data = jpeg(image, orientation)
    assert decode(data).size == (400, 200)
    assert decode(data, least=least).size == seen
    assert decode(picture(9, (400, 200)), least=(40, 20)).size == (400, 200)  # a png knows none


def test_a_draft_shows_the_same_place():
    """Of a smooth picture the same pixels within 2 grey levels; frames tell the stored size."""
    sides = [jpeg(ramp((400, 240))), jpeg(ramp((800, 480)))]
    sample = Sample("a.tar/1", "text", sides, None, {})
    for seed in range(4):
        plain = Augment((32, 32), crop="random", flip=True)
        whole = load_sample(sample, plain, seed)
        draft = load_sample(sample, plain._replace(draft=True), seed)
        assert draft.frames == whole.frames
        for one, other in zip(draft.images, whole.images, strict=True):
            assert one.shape == (32, 32, 3)
            assert abs(one.astype(int) - other).max() <= 2


def test_a_broken_best_side_is_named_in_draft_mode_too():
    sample = Sample("a.tar/1", "text", [b"no image", jpeg(ramp((400, 240)))], None, {})
    with pytest.raises(BrokenSample, match="a.tar/1: chosen is not a png, jpg or webp image"):
        load_sample(sample, Augment((32, 32), draft=True), 1)


def noise(size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    """Return a JPEG in which every pixel differs from its neighbours."""
    shape = (*size[::-1], len(mode)) if len(mode) > 1 else size[::-1]
    pixels = np.random.RandomState(1).randint(0, 255, shape).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(16, 16), (37, 21)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_pixels_without_pil_are_those_of_pil(size: tuple[int, int], options: dict):
    data = noise(size, **options)
    pixels = ImageHeader.read(data).pixels()
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


@pytest.mark.parametrize(
    "data",
    [noise((16, 8), "L"), noise((16, 8), "CMYK"), jpeg(ramp((16, 8)), 6), picture(1)],
    ids=["grey", "CMYK", "turned", "png"],
)
def test_whatever_else_is_left_to_pil(data: bytes):
    assert ImageHeader.read(data).pixels() is None
    assert decode(data).mode == "RGB"


def test_half_a_jpeg_is_left_to_pil_which_refuses_it():
    half = ImageHeader.read(noise((64, 64))[:-900])
    assert half.pixels() is None
    with pytest.raises(BrokenSample, match="cannot be decoded .*truncated"):
        half.decoded()


def test_samples_are_the_same_with_and_without_pil(monkeypatch: pytest.MonkeyPatch):
    """Sides of the crop's own height: nothing is resized, all is cut out and mirrored."""
    sides = [noise((48, 32)), noise((48, 32), quality=30)]
    sample = Sample("a.tar/1", "text", sides, None, {})
    augment = Augment((32, 32), crop="random", flip=True)
    fast = [load_sample(sample, augment, seed) for seed in range(8)]
    monkeypatch.setattr(ImageHeader, "pixels", lambda self: None)
    for seed, one in enumerate(fast):
        other = load_sample(sample, augment, seed)
        assert one.frames == other.frames
        for mine, theirs in zip(one.images, other.images, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert len({str(one.frames) for one in fast}) > 4


@pytest.mark.parametrize("data", [b"", b"no image", picture(1, form="GIF")])
def test_what_is_no_image_has_no_size(data: bytes):
    assert upright_size(data) == (0, 0)


def test_sizes_are_read_without_the_pixels():
    cut = picture(1, (300, 200))[:60]
    assert upright_size(cut) == (300, 200)
    assert upright_size(png_header(1_000_000, 5)) == (0, 0)
