"""Flaws of the toy world's training images: blur, dim light, displaced objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images with a Gaussian of `sigma` (B,) pixels; 0 leaves them unchanged."""
    batch, channels, height, width = images.shape
    offsets = torch.arange(-4.0, 5.0)
    kernel = (-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    rows = F.pad(images.reshape(1, batch * channels, height, width), (4, 4, 4, 4), "replicate")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=batch * channels)
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=batch * channels)
    return rows.view_as(images)


def dim(images: Tensor, light: Tensor) -> Tensor:
    """Scale the brightness of images by `light` (B,); 1 leaves them unchanged."""
    return (images + 1) * light[:, None, None, None] - 1


def draw_flaws(count: int, share: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one flaw for a share of the pictures: a third each of blur, dim light, displacement.

    Returns:
        Blur's sigma (B,), light (B,) and displacement of both objects (B, 2, 2) in pixels.
    """
    flawed = torch.rand(count, generator=generator) < share
    kind = torch.randint(3, (count,), generator=generator).masked_fill(~flawed, -1)
    how_much = torch.rand(count, generator=generator)
    angle = 2 * torch.pi * torch.rand(count, 2, generator=generator)
    sigma = (0.8 + 0.8 * how_much) * (kind == 0)
    light = torch.where(kind == 1, 0.9 - 0.2 * how_much, torch.ones(count))
    away = (3 + 3 * how_much) * (kind == 2)
    displacement = away[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return sigma, light, displacement
