"""Check the samples of a data module against a method: pairs, ranked lists, or single images."""

from __future__ import annotations

from typing import Literal, Protocol

from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.data.shards.sides import Known, described, side_counts
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.datamodules.rollouts import PromptCollections
from lit_prefopt.errors import InputError

TrainsOn = Literal["pairs", "lists", "likes"]
"""What a method compares: two sides, all sides of a ranked list, or single images."""

LIST_CURE = "convert them again with `--samples lists --list_size"


class SideUser(Protocol):
    """The part of a method on which the sides of its samples depend."""

    trains_on: TrainsOn
    chosen_only: bool
    needs_known: tuple[Known, ...]


def check_sides(method: SideUser, data: object) -> None:
    """Check that a method can train on the samples of its data, and choose the sides to read.

    A method of pairs reads the best and the worst image of a ranked list, and so does one of
    single images, which takes the two as liked and disliked.

    Args:
        method: The method.
        data: The data module, after its setup; one without stored pairs is not checked.

    Raises:
        InputError: The samples are of a kind that the method cannot train on.
    """
    pairs = data.held_out if isinstance(data, PromptCollections) else data
    if not isinstance(pairs, StoredPairs):
        return
    shortened = set[int]()
    for reader, named in pairs.readers:
        counts = side_counts(reader.shards)
        _check_counts(method, counts, ", ".join([named] if isinstance(named, str) else named))
        reader.pairs_only = method.trains_on != "lists" and max(counts, default=0) > 2
        reader.required = method.needs_known
        shortened |= counts if reader.pairs_only else set()
    if shortened:
        rank_zero_info(
            f"{type(method).__name__} trains on {method.trains_on}: of {described(shortened)} "
            "images the best and the worst are used."
        )


def _check_counts(method: SideUser, counts: set[int], shards: str) -> None:
    name, what = type(method).__name__, described(counts)
    if 1 in counts and len(counts) > 1:
        raise InputError(
            f"{shards} has {what}, which one training cannot mix: name shards of one kind."
        )
    if 1 in counts and not (method.trains_on == "likes" or method.chosen_only):
        raise InputError(
            f"{name} compares images of one prompt, and {shards} has single images with likes and "
            "dislikes: take a method of single images, such as `--model SupervisedFineTuning` on "
            "the liked ones, or give shards of pairs."
        )
    if method.trains_on == "lists" and len(counts) > 1:
        raise InputError(
            f"{shards} has {what} images, and a batch of {name} needs lists of one length: "
            f"{LIST_CURE} {_usual(counts)}`, which takes the best, the worst and those at even "
            "steps between, and leaves shorter lists out."
        )


def _usual(counts: set[int]) -> int:
    """Return a length for the cure: the shortest that is a list, or that of pairs."""
    return min([count for count in counts if count > 2], default=2)
