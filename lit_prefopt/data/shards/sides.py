"""Sides of a sample: the names of its images in a tar, and its scores and seeds in its .json.

A pair is 000001.chosen.jpg and 000001.rejected.jpg, a ranked list 000001.rank1.jpg (the best),
000001.rank2.jpg and so on, and a single image, liked or disliked, 000001.image.jpg.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lit_prefopt.data.shards.format import EXTENSIONS, SIDES, Shard

Known = Literal["scores", "noise_seeds"]
"""What may be known of each side beside its image."""

SINGLE = ("image",)
RANK = re.compile(r"rank([1-9]\d?)")
BY_SIDE = ("scores", "ranks", "seeds")
"""Entries of a .json with one value for each side: a list, or a mapping by chosen and rejected."""


def side_names(count: int) -> tuple[str, ...]:
    """Return the names of the images of a sample with so many sides, best side first."""
    if count <= 2:
        return SINGLE if count == 1 else SIDES
    return tuple(f"rank{number}" for number in range(1, count + 1))


def names_in(members: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the images of a stored sample, best side first.

    Args:
        members: Extensions of its members, such as `chosen.jpg`; those that are no side, such as
            `txt`, are ignored. Without any side they are read as those of a pair.
    """
    parts = (name.rpartition(".") for name in members)
    stems = {stem for stem, _, ending in parts if ending in EXTENSIONS}
    ranks = [int(found[1]) for stem in stems if (found := RANK.fullmatch(stem))]
    if stems & {*SIDES} or not (ranks or stems & {*SINGLE}):
        return SIDES
    if not ranks:
        return SINGLE
    # a list has two images at least: of a lone rank1, rank2 is missing
    return tuple(f"rank{number}" for number in range(1, max(2, *ranks) + 1))


def is_side(member: str) -> bool:
    """Return whether an extension, such as `chosen.jpg`, is that of an image of a sample."""
    stem, _, ending = member.rpartition(".")
    known = stem in (*SIDES, *SINGLE) or RANK.fullmatch(stem)
    return bool(known) and ending in EXTENSIONS


def picked_meta(meta: Mapping[str, Any], sides: int, which: Sequence[int]) -> dict[str, Any]:
    """Return the .json of a sample of which some sides are taken.

    Args:
        meta: Its .json.
        sides: Number of its sides.
        which: Indices of the sides to take, best first.
    """
    picked = dict(meta)
    for name in BY_SIDE:
        values = picked.get(name)
        if isinstance(values, list) and len(values) == sides:
            picked[name] = [values[side] for side in which]
    return picked


def scores_in(meta: Mapping[str, Any], sides: int) -> list[float] | None:
    """Return the score of each side from a .json, best side first; None if they are not all known.

    Args:
        meta: The .json of a sample.
        sides: Number of its sides.
    """
    values = _by_side(meta.get("scores"), sides)
    if all(type(one) in (int, float) and math.isfinite(one) for one in values):
        return [float(one) for one in values] or None
    return None


def seeds_in(meta: Mapping[str, Any], sides: int) -> list[int] | None:
    """Return the seed of each generated image from a .json; None if they are not all known.

    Args:
        meta: The .json of a sample. An image that was not generated has no seed.
        sides: Number of its sides.
    """
    values = _by_side(meta.get("seeds"), sides)
    if all(type(one) is int and -(2**63) <= one < 2**63 for one in values):
        return values or None
    return None


def missing_in(meta: Mapping[str, Any], sides: int, required: Sequence[Known]) -> Known | None:
    """Return the first of what is required of each side that a .json does not have."""
    found = {"scores": scores_in(meta, sides), "noise_seeds": seeds_in(meta, sides)}
    return next((name for name in required if found[name] is None), None)


def is_like(meta: Mapping[str, Any]) -> bool:
    """Return whether the .json of a single image has a label: 1 if it is liked, 0 if not."""
    return meta.get("label") in (0, 1)


def side_counts(shards: Iterable[Shard]) -> set[int]:
    """Return the numbers of images that the samples of some shards have: 2 for pairs."""
    return set().union(*(shard.side_counts for shard in shards))


def spread(ranked: int, count: int) -> list[int]:
    """Return indices of a ranked list at even steps, with the best and the worst.

    Args:
        ranked: Number of sides of the list.
        count: Number of sides to take, from 2 to `ranked`.
    """
    return [round(step * (ranked - 1) / (count - 1)) for step in range(count)]


def described(counts: Iterable[int]) -> str:
    """Return what samples of these numbers of sides are, for messages: `pairs`, `lists of 4`."""
    ordered = sorted(set(counts))
    lists = [count for count in ordered if count > 2]
    parts = ["single images"] * (1 in ordered) + ["pairs"] * (2 in ordered)
    if lists:
        size = str(lists[0]) if len(lists) == 1 else f"{lists[0]} to {lists[-1]}"
        parts.append(f"lists of {size}")
    return " and ".join(parts)


def _by_side(values: Any, sides: int) -> list[Any]:
    """Return the values of all sides in their order, an empty list if they are not given so."""
    if isinstance(values, dict) and sides == len(SIDES):
        values = [values.get(side) for side in SIDES]
    return values if isinstance(values, list) and len(values) == sides else []
