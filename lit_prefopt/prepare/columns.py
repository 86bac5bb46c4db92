"""Column names of a source: which key or column holds the prompt, the images, the label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from lit_prefopt.errors import quoted

Names = str | list[str]


def _names(*names: str) -> Any:
    return field(default_factory=lambda: [*names])


@dataclass(frozen=True)
class Columns:
    """Names of keys or columns; if several are given, the first that a record has is used.

    A record with `images` is a ranked list, one with `chosen` and `rejected` a pair whose order is
    known, one with `first` and `second` a pair ordered by its `label`. Records with one `image`
    each are ranked lists by prompt, or with `--samples likes` images with a label of their own. An
    image is a path, its bytes, base64, or a mapping with the keys bytes and path; a list in a cell
    of a table is JSON or separated by | ; or commas.

    Args:
        prompt: The text that the images were generated for.
        chosen: The better image.
        rejected: The worse image.
        first: One image of a pair with a label.
        second: The other image of a pair with a label.
        label: Probability from 0 to 1 that `first` is better: 1, 0, 0.5 for a tie, or between. Of
            one `image`, 1 if it is liked and 0 if not.
        images: The images of a ranked list.
        ranked: The images of a ranked list in columns of their own, the best first: all of these
            columns that a record has.
        image: The image of a record that has one, with its own rank, score or votes.
        ranking: A rank for each image: 1 is best, equal ranks are a tie.
        scores: A score for each image: higher is better. Ranks take precedence over scores.
        votes: How many annotators, or which share of them, preferred each image; used only
            without ranks and scores. With `chosen` and `rejected`: two numbers, the larger of
            which belongs to the chosen side.
        group: Key of the records with one image that are ranked together; the prompt by default.
        opinions: One ranking of all images per annotator.
        examples: How many records share the prompt; the pair's weight becomes one over it, so
            that each prompt counts once. Ignored unless it is named; in Pick-a-Pic it is
            num_example_per_prompt.
        labelled: Whether the record has a preference at all; records where it is false are
            skipped.
    """

    prompt: Names = _names("prompt", "caption", "original_prompt", "text", "txt")
    chosen: Names = _names("chosen")
    rejected: Names = _names("rejected")
    first: Names = _names("jpg_0", "image_0")
    second: Names = _names("jpg_1", "image_1")
    label: Names = _names("label_0", "label")
    images: Names = _names("images")
    ranked: Names = _names(*(f"rank{number}" for number in range(1, 10)))
    image: Names = _names("image", "image_path", "file_name")
    ranking: Names = _names("ranking", "rank")
    scores: Names = _names("scores", "score")
    votes: Names = _names("votes")
    group: Names = _names("prompt_id")
    opinions: Names = _names("opinions")
    examples: Names = _names()
    labelled: Names = _names("has_label")

    def all(self) -> set[str]:
        """Return all column names that are read."""
        return {name for names in astuple(self) for name in _listed(names)}

    def names(self, role: str) -> list[str]:
        """Return the column names of a role."""
        return _listed(getattr(self, role))

    def find(self, role: str, values: Mapping[str, Any]) -> Any:
        """Return a record's value for a role, or None if it has none."""
        for name in self.names(role):
            if values.get(name) is not None:
                return values[name]
        return None

    def complete(self, values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        """Return values, with those of `more` for the roles that they do not fill."""
        absent = [one.name for one in fields(self) if self.find(one.name, values) is None]
        names = [name for role in absent for name in self.names(role)]
        return values | {name: more[name] for name in names if name in more}

    def names_of(self, role: str) -> str:
        """Return the column names of a role, for messages."""
        return " or ".join(map(quoted, self.names(role)))


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else names
