"""Scenes of the toy world and their captions.

Captions and scenes are equivalent: `parse` is the inverse of `Scene.caption`.

    a large red circle on the left of a black background
    a red circle above a blue square on a white background
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from typing import Literal

from lit_prefopt.errors import InputError, quoted

Split = Literal["train", "held-out"]
TESTED = 256  # held-out captions for reported results

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "middle")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("black", "grey", "white")

_OPPOSITE = {"right of": "left of", "below": "above"}
_AT = dict(zip(PLACES, ("on the", "on the", "at the", "at the", "in the"), strict=True))
_OBJECT = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GRAMMAR = re.compile(
    rf"{_OBJECT} (?:(?:on|at|in) the ({'|'.join(PLACES)}) of"
    rf"|({'|'.join(RELATIONS)}) {_OBJECT} on) a ({'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; only single objects have size and place."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """A background with one object somewhere, or with two objects in a relation."""

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def caption(self) -> str:
        """Return the caption of this scene."""
        if self.relation is None:
            (item,) = self.objects
            where = f"{_AT[item.place or '']} {item.place} of"
        else:
            item, other = self.objects
            where = f"{self.relation} {other} on"
        return f"{item} {where} a {self.background} background"

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes in the caption, in the judge's order."""
        if self.relation is None:
            return ("colour", "shape", "size", "place", "background")
        return ("colour", "shape", "background", "relation")

    def upright(self) -> Scene:
        """Return the equivalent scene with the relation "left of" or "above"."""
        if self.relation not in ("right of", "below"):
            return self
        return Scene(self.background, self.objects[::-1], _OPPOSITE[self.relation])


@cache
def parse(caption: str) -> Scene:
    """Parse a caption into its scene."""
    found = _GRAMMAR.fullmatch(caption)
    if found is not None:
        size, colour, shape, place, relation, _, colour2, shape2, background = found.groups()
        items = [SceneObject(colour, shape, size, place)]
        items += [SceneObject(colour2, shape2)] if relation else []
        scene = Scene(background, tuple(items), relation)
        if scene in _all_of(relation is not None) and scene.caption() == caption:
            return scene
    raise InputError(
        f"{quoted(caption)} is not a caption of the toy world; try {_single()[0].caption()!r}"
        " or take one from lit_prefopt.toy.scenes.prompts()"
    )


def all_scenes() -> list[Scene]:
    """Return every scene of the toy world: 720 with one object, 5760 with two."""
    return [*_single(), *_double()]


def split(caption: str) -> Split:
    """Return the split of a caption; about one in ten is held out from all trainings."""
    digest = hashlib.blake2s(caption.encode(), digest_size=4).digest()
    return "held-out" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def prompts(count: int, of: Split = "train", two_objects: float = 0.75, seed: int = 0) -> list[str]:
    """Return distinct captions of one split in a fixed random order.

    Args:
        count: Number of captions.
        of: The split, "train" or "held-out".
        two_objects: Share of captions with two objects.
        seed: Seed of the choice and the order.
    """
    double = round(count * two_objects)
    chosen: list[str] = []
    for wanted, two in ((count - double, False), (double, True)):
        pool = captions(of, two)
        if wanted > len(pool):
            raise InputError(
                f"the toy world has {len(pool)} {of} captions with {1 + two} object(s), not"
                f" {wanted}: lower count or change two_objects"
            )
        chosen += sorted(pool, key=lambda text: _rank(text, seed))[:wanted]
    return sorted(chosen, key=lambda text: _rank(text, seed))


def unused(count: int) -> list[str]:
    """Return held-out captions that are in no list of 256 or fewer held-out `prompts`.

    They are for tuning settings, so that results on the other captions are unbiased. Nearly all
    of them have two objects.

    Args:
        count: How many, in a fixed random order.
    """
    tested = {*prompts(TESTED, "held-out")}
    every = [*captions("held-out", False), *captions("held-out", True)]
    left = sorted((text for text in every if text not in tested), key=lambda x: _rank(x, 0))
    if count > len(left):
        raise InputError(f"{len(left)} held-out captions are unused, not {count}: lower count")
    return left[:count]


@cache
def captions(of: Split, two_objects: bool) -> tuple[str, ...]:
    """Return all captions of one split with one object, or with two."""
    texts = (scene.caption() for scene in (_double() if two_objects else _single()))
    return tuple(text for text in texts if split(text) == of)


@cache
def changes(scene: Scene, attribute: str) -> tuple[Scene, ...]:
    """Return the scenes that differ from this one only in that attribute of one object."""
    if attribute == "background":
        return tuple(replace(scene, background=b) for b in BACKGROUNDS if b != scene.background)
    if attribute == "relation":
        return tuple(replace(scene, relation=r) for r in RELATIONS if r != scene.relation)
    words = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}[attribute]
    found = []
    for i, item in enumerate(scene.objects):
        for word in words:
            items = list(scene.objects)
            items[i] = replace(item, **{attribute: word})
            found.append(replace(scene, objects=tuple(items)))
    world = _all_of(scene.relation is not None)
    return tuple(other for other in found if other != scene and other in world)


def _rank(text: str, seed: int) -> bytes:
    return hashlib.blake2s(f"{seed}/{text}".encode()).digest()


@cache
def _single() -> tuple[Scene, ...]:
    parts = product(BACKGROUNDS, COLOURS, SHAPES, SIZES, PLACES)
    return tuple(Scene(background, (SceneObject(*rest),)) for background, *rest in parts)


@cache
def _double() -> tuple[Scene, ...]:
    parts = product(BACKGROUNDS, permutations(COLOURS, 2), SHAPES, SHAPES, RELATIONS)
    return tuple(
        Scene(background, (SceneObject(one, shape), SceneObject(two, other)), relation)
        for background, (one, two), shape, other, relation in parts
    )


@cache
def _all_of(two_objects: bool) -> frozenset[Scene]:
    return frozenset(_double() if two_objects else _single())
