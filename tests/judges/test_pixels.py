"""Preprocessing of judges: equal to the stock processors; what very long images become."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessor

from lit_prefopt.judges import pixels
from lit_prefopt.judges.pixels import center_crop

SIDES = [(1024, 768), (800, 600), (640, 480), (1536, 640), (1344, 768), (1216, 832), (1152, 896)]
SIDES += [(512, 512), (500, 333), (333, 250), (301, 225), (227, 224), (226, 225), (225, 224)]
SIDES += [(1023, 767), (97, 61), (64, 64), (200, 30), (13, 9), (3, 2)]
SIZES = sorted({size for side in SIDES for size in (side, side[::-1])})


def picture(width: int, height: int) -> Image.Image:
    """Return a picture of smooth noise that uses all 256 values."""
    noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    smooth = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))
    values = numpy.asarray(smooth, dtype=numpy.float64)
    values = 255 * (values - values.min()) / max(1, numpy.ptp(values))
    return Image.fromarray(values.round().astype(numpy.uint8))


def tensor(picture: Image.Image) -> torch.Tensor:
    """Return a picture as images of one row, (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_images_are_those_of_the_stock_processors(width: int, height: int) -> None:
    shown = picture(width, height)
    [stock] = CLIPImageProcessor()(shown, return_tensors="pt", do_normalize=False).pixel_values
    own = center_crop(tensor(shown), 224)
    # Pillow 13 resizes the columns of tall pictures first: findings/pillow-tall-resize.sh
    most = 1e-3 if height > 2 * width else 2e-4
    assert (own[0] - stock).abs().mean() < most
    assert (own[0] - stock).abs().max() < 3.5 / 255

    # torchvision's Resize and CenterCrop of a PIL image, by its documented rule
    long = int(224 * max(shown.size) / min(shown.size))
    size = (long, 224) if width > height else (224, long)
    left, top = (int(round((length - 224) / 2.0)) for length in size)  # noqa: RUF046
    resized = shown.resize(size, Image.Resampling.BICUBIC)
    cut = resized.crop((left, top, left + 224, top + 224))
    other = center_crop(tensor(shown), 224, "torchvision")
    assert (other - (tensor(cut) + 1) / 2).abs().mean() < most


def test_an_odd_rest_is_cut_as_each_library_does() -> None:
    """Of 227 columns one is left of the crop in transformers, two in torchvision."""
    columns = torch.linspace(-1, 1, 227).expand(1, 3, 224, 227)
    assert (227 - 224) // 2 == 1
    own, other = (center_crop(columns, 224, crop) for crop in ("transformers", "torchvision"))
    assert torch.equal(own[..., 1:], other[..., :-1])
    assert not torch.equal(own, other)


@pytest.mark.parametrize("shape", [(4, 128), (128, 4), (9, 16), (8, 8)])
def test_up_to_a_bound_the_whole_image_is_resized(shape: tuple[int, int]):
    images = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    size = [length * 8 // min(shape) for length in shape]
    whole = F.interpolate((images + 1) / 2, size, mode="bicubic").clamp(0, 1)
    top, left = ((length - 8) // 2 for length in size)
    assert torch.equal(center_crop(images, 8, "tensor"), whole[..., top : top + 8, left : left + 8])


@pytest.mark.parametrize("shape", [(1, 16_384), (16_384, 2)])
def test_beyond_it_the_far_ends_are_not(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    sizes = []
    interpolate = F.interpolate

    def recorded(images: torch.Tensor, size: list[int], **options: object) -> torch.Tensor:
        sizes.append(size)
        return interpolate(images, size, **options)

    monkeypatch.setattr(pixels.F, "interpolate", recorded)
    images = torch.zeros(1, 3, *shape)
    images[..., shape[0] // 2 :, shape[1] // 2 :] = 1  # the middle shows an edge
    square = center_crop(images, 224)
    assert square.shape == (1, 3, 224, 224)
    assert square.min() < 0.6 < 0.9 < square.max()
    assert max(map(max, sizes)) == 32 * 224
