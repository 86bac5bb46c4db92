"""Preprocessing of judges: what very long images become."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_prefopt.judges import pixels
from lit_prefopt.judges.pixels import center_crop


@pytest.mark.parametrize("shape", [(4, 128), (128, 4), (9, 16), (8, 8)])
def test_up_to_a_bound_the_whole_image_is_resized(shape: tuple[int, int]):
    images = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    size = [round(length * 8 / min(shape)) for length in shape]
    whole = F.interpolate((images + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((length - 8) // 2 for length in size)
    assert torch.equal(center_crop(images, 8), whole[..., top : top + 8, left : left + 8])


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
    assert max(sizes[0]) == 32 * 224
