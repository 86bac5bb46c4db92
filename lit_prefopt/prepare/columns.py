"""Under which names a source holds what we look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

Names = str | list[str]


def _names(*names: str) -> Any:
    return field(default_factory=lambda: [*names])


@dataclass(frozen=True)
class Columns:
    """The names of keys or columns; of several, the first that a record has is taken.

    A record with `images` is a ranked list, one with `chosen` and `rejected` a pair whose order is
    known, one with `first` and `second` a pair whose `label` tells the order. An image is a path,
    its bytes, or a mapping with the keys bytes and path.

    Args:
        prompt: The text that the images were made for.
        chosen: The better image.
        rejected: The worse image.
        first: One image of a pair with a label.
        second: The other image of a pair with a label.
        label: Probability from 0 to 1 that `first` is better: 1, 0, 0.5 for a tie, or between.
        images: The images of a ranked list.
        ranking: A rank for each of them: 1 is best, equal ranks are a tie.
        scores: A score for each of them: higher is better. Where ranks are known they decide.
        votes: How many people, or which share of them, preferred each image; they decide where
            there is neither rank nor score. With `chosen` and `rejected`: two numbers, of which
            the larger one is the chosen side's.
        opinions: One ranking of all images for each person who was asked.
        examples: How many records share the prompt, where each prompt is to count once: a pair's
            weight becomes one over it. Not looked for unless it is named; in Pick-a-Pic it is
            num_example_per_prompt.
        labelled: Whether the record tells a preference at all; where this is false it is left out.
    """

    prompt: Names = _names("prompt", "caption", "original_prompt", "text", "txt")
    chosen: Names = _names("chosen")
    rejected: Names = _names("rejected")
    first: Names = _names("jpg_0", "image_0")
    second: Names = _names("jpg_1", "image_1")
    label: Names = _names("label_0", "label")
    images: Names = _names("images")
    ranking: Names = _names("ranking")
    scores: Names = _names("scores")
    votes: Names = _names("votes")
    opinions: Names = _names("opinions")
    examples: Names = _names()
    labelled: Names = _names("has_label")

    def all(self) -> set[str]:
        """Return every name that is looked for."""
        return {name for names in astuple(self) for name in _listed(names)}

    def find(self, role: str, values: Mapping[str, Any]) -> Any:
        """Return what a record holds in a role, None where it holds nothing."""
        for name in _listed(getattr(self, role)):
            if values.get(name) is not None:
                return values[name]
        return None

    def names_of(self, role: str) -> str:
        """Return the names of a role, for messages."""
        return " or ".join(map(repr, _listed(getattr(self, role))))


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else names
