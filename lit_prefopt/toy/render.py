"""Render toy scenes: 32×32 pixels, anti-aliased, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lit_prefopt.toy.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene

SIZE = 32
# hues about 60 degrees apart over backgrounds without any hue, so that hue alone separates
# objects from the background, and one colour from another
_RGB = {
    "red": (0.95, 0.10, 0.10),
    "yellow": (0.95, 0.85, 0.05),
    "green": (0.10, 0.75, 0.15),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.15, 0.20, 0.95),
    "purple": (0.75, 0.15, 0.80),
    "black": (0.0, 0.0, 0.0),
    "grey": (0.3, 0.3, 0.3),
    "white": (1.0, 1.0, 1.0),
}
_AREA = {"small": 55.0, "large": 150.0, None: 75.0}  # pixels; all shapes of a size have one area
_MIDDLE, _STEP, _APART, _FAR = SIZE / 2, 5.5, 7.0, -100.0
_PLACE = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0),
}  # fmt: skip
DIRECTIONS = dict(zip(RELATIONS, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True))


class SceneLayout(NamedTuple):
    """Scenes as tensors; a single object's second slot is far outside the image."""

    background: Tensor  # (B,) int64
    colours: Tensor  # (B, 2) int64
    shapes: Tensor  # (B, 2) int64
    areas: Tensor  # (B, 2) float32, in pixels
    centres: Tensor  # (B, 2, 2) float32: x to the right, y down
    two: Tensor  # (B,) bool


def palette(names: Sequence[str]) -> Tensor:
    """Return the RGB values of colours, (N, 3) in [0, 1]."""
    return torch.tensor([_RGB[name] for name in names])


def layout(scenes: Sequence[Scene]) -> SceneLayout:
    """Return the nominal layout of the scenes, without variation."""
    rows = torch.tensor([_row(scene) for scene in scenes])
    objects = rows[:, 2:].view(-1, 2, 5)
    return SceneLayout(
        background=rows[:, 0].long(),
        colours=objects[..., 0].long(),
        shapes=objects[..., 1].long(),
        areas=objects[..., 2],
        centres=objects[..., 3:],
        two=rows[:, 1] > 0,
    )


def render(
    scenes: Sequence[Scene], generator: Generator | None = None, displace: Tensor | None = None
) -> Tensor:
    """Render images of the scenes, (B, 3, 32, 32) float32 in [-1, 1].

    Args:
        scenes: The scenes.
        generator: Varies position and size slightly, within the judge's tolerance; None renders
            the nominal layout.
        displace: (B, 2, 2) displacement of the objects in pixels.
    """
    plan = layout(scenes)
    areas, centres = plan.areas, plan.centres
    if generator is not None:
        areas = areas * (1 + 0.06 * (2 * torch.rand(areas.shape, generator=generator) - 1))
        centres = centres + 0.8 * (2 * torch.rand(centres.shape, generator=generator) - 1)
    if displace is not None:
        centres = centres + displace
    masks = shape_masks(centres, areas)
    index = plan.shapes[..., None, None, None].expand(-1, -1, 1, SIZE, SIZE)
    masks = masks.gather(2, index)  # (B, 2, 1, 32, 32)
    image = palette(BACKGROUNDS)[plan.background][..., None, None]
    for i, colour in enumerate(palette(COLOURS)[plan.colours].unbind(1)):
        image = torch.lerp(image, colour[..., None, None], masks[:, i])
    return image * 2 - 1


def shape_masks(centres: Tensor, areas: Tensor) -> Tensor:
    """Return the coverage of each pixel by each shape of that centre and area.

    Args:
        centres: (..., 2) centroids in pixels.
        areas: (...) areas in pixels.

    Returns:
        (..., 4, 32, 32) in [0, 1], in the order of `SHAPES`.
    """
    grid = torch.arange(SIZE, dtype=centres.dtype, device=centres.device) + 0.5
    x = grid - centres[..., 0, None, None]  # (..., 1, 32)
    y = grid[:, None] - centres[..., 1, None, None]  # (..., 32, 1)
    scale = areas.clamp(min=1e-3).sqrt()[..., None, None]
    across, down = x.abs(), y.abs()
    rim = scale / sqrt(3 * sqrt(3))  # inner radius of the triangle
    bar, arm = 0.25 * scale, 0.625 * scale  # (2 * arm)² - 4 * (arm - bar)² = area
    distances = {
        "circle": (x.square() + y.square()).sqrt() - scale / sqrt(pi),
        "square": torch.maximum(across, down) - scale / 2,
        "triangle": torch.maximum(y.expand_as(x + y), (sqrt(3) * across - y) / 2) - rim,
        "cross": torch.minimum(
            torch.maximum(across - arm, down - bar), torch.maximum(across - bar, down - arm)
        ),
    }
    return (0.5 - torch.stack([distances[name] for name in SHAPES], -3)).clamp(0, 1)


@cache
def _row(scene: Scene) -> tuple[float, ...]:
    values = [float(BACKGROUNDS.index(scene.background)), float(scene.relation is not None)]
    for i in range(2):
        if i >= len(scene.objects):
            values += [0.0, 0.0, 0.0, _FAR, _FAR]
            continue
        item = scene.objects[i]
        if scene.relation is None:
            x, y = (_STEP * way for way in _PLACE[item.place or ""])
        else:
            x, y = ((1 - 2 * i) * _APART * way for way in DIRECTIONS[scene.relation])
        values += [float(COLOURS.index(item.colour)), float(SHAPES.index(item.shape))]
        values += [_AREA[item.size], _MIDDLE + x, _MIDDLE + y]
    return tuple(values)
