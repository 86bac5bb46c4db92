"""Exact judge of the toy world: score how well an image shows the scene of its caption.

Objects have a hue and backgrounds have none, so hue alone separates them: a pixel half covered by
an object has half its hue, blurred or not. Every score is continuous, so that two similar samples
still have an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.judges import Judge
from lit_prefopt.toy.render import DIRECTIONS, SIZE, SceneLayout, layout, palette, shape_masks
from lit_prefopt.toy.scenes import BACKGROUNDS, COLOURS, RELATIONS, Scene, parse

ATTRIBUTES = ("colour", "shape", "size", "place", "background", "cleanness", "relation")


class _PixelClasses(NamedTuple):
    """Classification of an image's pixels, independent of the caption."""

    colours: Tensor  # (B, 6, 32, 32): share of each pixel that has that object colour
    grounds: Tensor  # (B, 3): share of the border that has that background
    dirt: Tensor  # (B,): number of pixels that have no colour of the toy world


class ToyJudge(Judge):
    """Scores images of the toy world exactly, attribute by attribute, without training."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return the mean score over the attributes in each caption, (B,) in [0, 1].

        Args:
            images: (B, 3, 32, 32) in [-1, 1].
            texts: B captions.
            t: Ignored.
        """
        return torch.stack(list(self.attributes(images, texts).values())).nanmean(0)

    @torch.no_grad()
    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return one score per attribute, (B,) in [0, 1]; NaN if the caption does not contain it.

        Args:
            images: (B, 3, 32, 32) in [-1, 1].
            texts: B captions.
        """
        scenes = _checked(images, texts)
        plan = SceneLayout(*(field.to(images.device) for field in layout(scenes)))
        seen = _classify_pixels((images.float() + 1).clamp(0, 2) / 2)
        masks = _objects(seen.colours, plan)
        areas = masks.sum((-1, -2))  # (B, 2)
        centres = _centroids(masks, areas)
        present = torch.stack([torch.ones_like(plan.two), plan.two], 1).float()
        shape = (_shape(masks, areas, centres, plan) * present).sum(1) / present.sum(1)
        missing = torch.full_like(shape, torch.nan)
        relation = [RELATIONS.index(s.relation) if s.relation else 0 for s in scenes]
        return {
            "colour": _colour(seen.colours, plan, present),
            "shape": shape,
            "size": torch.where(plan.two, missing, _size(areas[:, 0], plan.areas[:, 0])),
            "place": torch.where(plan.two, missing, _place(centres, areas, plan)),
            "background": seen.grounds.gather(1, plan.background[:, None]).squeeze(1),
            "cleanness": _cleanness(seen),
            "relation": torch.where(plan.two, _relation(centres, areas, relation), missing),
        }


def _checked(images: Tensor, texts: Sequence[str]) -> list[Scene]:
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise InputError(
            f"the toy judge takes images of shape (B, 3, {SIZE}, {SIZE}), not"
            f" {tuple(images.shape)}; resize them first"
        )
    if len(images) != len(texts):
        raise InputError(f"{len(images)} images and {len(texts)} texts; give one text per image")
    if not torch.isfinite(images).all():
        raise InputError(
            "the images contain NaN or infinite pixels; find the step that produced them, often a"
            " VAE in float16, or a learning rate that is too high"
        )
    return [parse(text) for text in texts]


def _classify_pixels(rgb: Tensor) -> _PixelClasses:
    """Classify the pixels by the colours of the toy world; rgb in [0, 1]."""
    objects, grounds = palette(COLOURS).to(rgb), palette(BACKGROUNDS).to(rgb)
    hues = objects - objects.mean(1, keepdim=True)  # (6, 3): the palette without its grey part
    hue = rgb - rgb.mean(1, keepdim=True)
    strength = hue.square().sum(1, keepdim=True).sqrt()
    along = torch.einsum("bchw,kc->bkhw", hue, F.normalize(hues, dim=1))
    share = (12 * along / strength.clamp(min=0.05)).softmax(1)
    cover = share * strength / hues.norm(dim=1)[:, None, None]
    # a uniformly dim image is unclean but shows its objects at full size
    peak = F.avg_pool2d(cover.sum(1, keepdim=True), 3).amax((2, 3), keepdim=True).clamp(0.4, 1)
    # more contrast around one half: faint tints vanish, and areas do not change
    amount = cover.sum(1, keepdim=True) / peak
    colours = share * ((amount - 0.15) / 0.7).clamp(0, 1)
    rest = _outside(1 - colours.sum(1))  # (B, N)
    apart = (_outside(rgb)[:, None] - grounds[:, :, None]).square().sum(2)  # (B, 3, N)
    ground = ((-apart / 0.06).softmax(1) * rest[:, None]).sum(2)
    ground = ground / rest.sum(1, keepdim=True).clamp(min=rest.shape[1] / 3)
    nearest = _nearest(rgb, torch.cat([objects, grounds]))
    dirt = (1 - (-((nearest - 0.03).clamp(min=0) / 0.15).square()).exp()).sum((1, 2))
    return _PixelClasses(colours, ground, dirt)


def _outside(field: Tensor) -> Tensor:
    """Return the border of three pixels of (..., 32, 32) in one row, (..., N)."""
    edges = (field[..., :3, :], field[..., -3:, :], field[..., 3:-3, :3], field[..., 3:-3, -3:])
    return torch.cat([edge.flatten(-2) for edge in edges], -1)


def _nearest(rgb: Tensor, colours: Tensor) -> Tensor:
    """Return each pixel's distance from the nearest of the colours, (B, 32, 32)."""
    inner = torch.einsum("bchw,kc->bkhw", rgb, colours)
    squared = colours.square().sum(1)[:, None, None] - 2 * inner
    return (squared.amin(1) + rgb.square().sum(1)).clamp(min=0).sqrt()


def _objects(colours: Tensor, plan: SceneLayout) -> Tensor:
    """Return the masks of the two objects, (B, 2, 32, 32); a single object is all hued pixels.

    If an object's colour is missing, its mask is everything except the background and the other
    object, so its shape and place can be right although its colour is wrong.
    """
    every = colours.sum(1, keepdim=True)
    own = colours.gather(1, plan.colours[..., None, None].expand(-1, -1, SIZE, SIZE))
    found = (own.sum((-1, -2)) / (0.5 * plan.areas.clamp(min=1))).clamp(0, 1)[..., None, None]
    pair = found * own + (1 - found) * (every - own.flip(1)).clamp(min=0)
    single = torch.cat([every, torch.zeros_like(every)], 1)
    return torch.where(plan.two[:, None, None, None], pair, single)


def _centroids(masks: Tensor, areas: Tensor) -> Tensor:
    """Return the centroids, (B, 2, 2), as x to the right and y down."""
    grid = torch.arange(SIZE, device=masks.device) + 0.5
    x, y = masks.sum(-2) @ grid, masks.sum(-1) @ grid
    return torch.stack([x, y], -1) / areas.clamp(min=1)[..., None]


def _there(area: Tensor, full: float = 30.0) -> Tensor:
    """Return 1 if an object is large enough to have a shape and a place, else less."""
    return (area / full).clamp(0, 1)


def _colour(colours: Tensor, plan: SceneLayout, present: Tensor) -> Tensor:
    """Score the share of the objects' area in the right colours, minus missing area."""
    areas = colours.sum((-1, -2))
    own = areas.gather(1, plan.colours) * present
    # the smaller of the two sizes suffices: the size is another attribute
    full = (0.6 * plan.areas).clamp(min=1, max=35)
    found = ((own / full).clamp(max=1) * present).sum(1) / present.sum(1)
    return found * own.sum(1) / areas.sum(1).clamp(min=1)


def _shape(masks: Tensor, areas: Tensor, centres: Tensor, plan: SceneLayout) -> Tensor:
    """Score the fit of each mask to its shape, against the other shapes of that area."""
    ideal = shape_masks(centres, areas)  # (B, 2, 4, 32, 32)
    both = torch.minimum(ideal, masks[:, :, None]).sum((-1, -2))
    # |A or B| = |A| + |B| - |A and B|
    either = areas[..., None] + ideal.sum((-1, -2)) - both
    overlap = both / either.clamp(min=1)
    choice = (overlap / 0.025).softmax(-1).gather(2, plan.shapes[..., None]).squeeze(-1)
    fit = overlap.gather(2, plan.shapes[..., None]).squeeze(-1)
    return choice * (fit / 0.8).clamp(max=1) * _there(areas)


def _size(area: Tensor, wanted: Tensor) -> Tensor:
    ratio = (area.clamp(min=1) / wanted).log().abs()
    return (-((ratio - 0.15).clamp(min=0) / 0.35).square()).exp()


def _place(centres: Tensor, areas: Tensor, plan: SceneLayout) -> Tensor:
    away = (centres[:, 0] - plan.centres[:, 0]).norm(dim=-1)
    return (-((away - 1.5).clamp(min=0) / 2.5).square()).exp() * _there(areas[:, 0])


def _relation(centres: Tensor, areas: Tensor, relation: Sequence[int]) -> Tensor:
    """Score the direction from the second object to the first."""
    ways = torch.tensor([DIRECTIONS[name] for name in RELATIONS], device=centres.device)
    apart = centres[:, 0] - centres[:, 1]
    cosine = F.cosine_similarity(apart, ways[list(relation)].float(), dim=-1)
    # overlapping objects have no direction
    clear = (apart.norm(dim=-1) / 6).clamp(max=1)
    right = (((1 + cosine) / 2) ** 3 / 0.92).clamp(max=1)
    return right * clear * _there(areas.amin(1))


def _cleanness(seen: _PixelClasses) -> Tensor:
    """Score cleanness: 1 if only the rims of objects have mixed pixels."""
    area = seen.colours.sum((1, 2, 3))
    rim = 5.4 * area.sqrt()
    return (-((seen.dirt - rim).clamp(min=0) / 80)).exp()
