"""Preprocess images for judges: resize, crop or pad, and normalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.utils.transfer import to_device

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 32  # times the shorter side, of which a center crop resizes no more

Crop = Literal["transformers", "torchvision", "tensor"]
"""Preprocessing that a judge was published with: image processors of transformers, torchvision on
images of PIL, or torchvision on float tensors without antialiasing. The first two round to 8 bits
after each of the two passes of a resize. Where an odd number of pixels is cut off, transformers
rounds the offset of the crop down and torchvision to even."""


def center_crop(images: Tensor, side: int, crop: Crop = "transformers") -> Tensor:
    """Resize the shorter side and crop the center to squares in [0, 1], as CLIP does.

    The longer side is truncated to whole pixels, not rounded.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        side: Width and height in pixels.
        crop: Preprocessing that is followed.
    """
    images = _without_far_ends(images)
    shorter = min(images.shape[-2:])
    high, wide = (side * length // shorter for length in images.shape[-2:])
    unit = (images.float() + 1) / 2
    if crop == "tensor":
        unit = F.interpolate(unit, (high, wide), mode="bicubic").clamp(0, 1)
    else:
        for size in ((images.shape[-2], wide), (high, wide)):  # rows first, as PIL does
            unit = _eight_bit(F.interpolate(_eight_bit(unit), size, mode="bicubic", antialias=True))
    rests = (high - side, wide - side)
    top, left = (rest // 2 if crop == "transformers" else round(rest / 2) for rest in rests)
    return unit[..., top : top + side, left : left + side]


def _eight_bit(unit: Tensor) -> Tensor:
    return (unit * 255).round().clamp(0, 255) / 255


def _without_far_ends(images: Tensor) -> Tensor:
    """Cut the ends of very long images, which the center crop would enlarge without showing."""
    most = LONGEST * min(images.shape[-2:])
    top, left = (max(0, (length - most) // 2) for length in images.shape[-2:])
    return images[..., top : top + most, left : left + most]


def pad_to_square(images: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Resize the longer side and pad with black to squares, without clamping.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        side: Width and height in pixels.
        antialias: Smooth them as they shrink.
    """
    scale = side / max(images.shape[-2:])
    size = [max(1, round(length * scale)) for length in images.shape[-2:]]
    unit = (images.float() + 1) / 2
    if scale != 1:
        unit = F.interpolate(unit, size, mode="bicubic", antialias=antialias)
    high, wide = (side - length for length in size)
    return F.pad(unit, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def normalize(
    unit: Tensor,
    mean: Sequence[float] = CLIP_MEAN,
    deviation: Sequence[float] = CLIP_DEVIATION,
) -> Tensor:
    """Normalize images by the mean and deviation that a tower was trained with.

    Args:
        unit: (B, 3, S, S) in [0, 1].
        mean: Of red, green and blue.
        deviation: Of red, green and blue.
    """
    centre, width = (
        to_device(torch.tensor(values), unit.device).view(3, 1, 1) for values in (mean, deviation)
    )
    return (unit - centre) / width
