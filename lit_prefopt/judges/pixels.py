"""Preprocess images for judges: resize, crop or pad, and normalize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.utils.transfer import to_device

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 32  # times the shorter side, of which a center crop resizes no more


def center_crop(images: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Resize the shorter side and crop the center to squares in [0, 1], as CLIP does.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        side: Width and height in pixels.
        antialias: Smooth them as they shrink.
    """
    images = _without_far_ends(images)
    scale = side / min(images.shape[-2:])
    size = [max(side, round(length * scale)) for length in images.shape[-2:]]
    unit = (images.float() + 1) / 2
    unit = F.interpolate(unit, size, mode="bicubic", antialias=antialias).clamp(0, 1)
    top, left = ((length - side) // 2 for length in size)
    return unit[..., top : top + side, left : left + side]


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
