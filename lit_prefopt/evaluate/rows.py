"""Rows of `per_prompt.jsonl`: an image of a prompt by both models, with their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Attributes = dict[str, float | None]
SIDES = ("reference", "policy")


@dataclass
class ImageScores:
    """Scores of one image.

    Args:
        scores: By the judges' names; the first one's is the reward.
        attributes: By the judges' names; None if one does not apply.
        alike: Mean cosine with the other images of the prompt, if there are any.
        read: 1 if the text quoted in the prompt is found in the image, else 0; None without
            quoted text.
        picture: Path of the image relative to the file; None if it was not saved.
    """

    scores: dict[str, float]
    attributes: dict[str, Attributes] = field(default_factory=dict)
    alike: float | None = None
    read: float | None = None
    picture: str | None = None

    @property
    def reward(self) -> float:
        """The first judge's score."""
        return next(iter(self.scores.values()))

    def record(self, side: str) -> dict[str, Any]:
        """Return the scores under the keys of a file's line."""
        first, *others = self.scores
        values = {
            "reward": self.reward,
            "scores": self.scores,
            "attributes": self.attributes.get(first, {}),
            "picture": self.picture,
        }
        further = {name: self.attributes[name] for name in others if name in self.attributes}
        optional = {
            "alike": self.alike,
            "text_read": self.read,
            "other_attributes": further or None,
        }
        values |= {name: value for name, value in optional.items() if value is not None}
        return {f"{name}_{side}": value for name, value in values.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], side: str) -> ImageScores:
        """Parse the scores that `record` returned."""
        scores = record[f"scores_{side}"]
        own = record[f"attributes_{side}"]
        attributes = {next(iter(scores)): own} if own else {}
        attributes |= record.get(f"other_attributes_{side}", {})
        alike, read = (record.get(f"{name}_{side}") for name in ("alike", "text_read"))
        return cls(scores, attributes, alike, read, record[f"picture_{side}"])


@dataclass
class ComparisonRow:
    """One image of a prompt by both models.

    Args:
        text: The prompt.
        seed: Seed of the policy's image, and of the reference's unless that has its own.
        reference: Scores of the reference's image.
        policy: Scores of the policy's image.
        prompt: Number of the prompt.
        image: Number of the image among the prompt's.
        category: Of the prompt, if it has one.
        seed_reference: Seed of the reference's image if it differs.
        similarity: Cosine of the two images, if it was computed.
    """

    text: str
    seed: int
    reference: ImageScores
    policy: ImageScores
    prompt: int = 0
    image: int = 0
    category: str | None = None
    seed_reference: int | None = None
    similarity: float | None = None

    def line(self) -> str:
        """Return the row as a line of `per_prompt.jsonl`."""
        names = ("text", "seed", "prompt", "image", "category")
        record = {name: getattr(self, name) for name in names}
        record |= self.reference.record("reference") | self.policy.record("policy")
        for name in ("seed_reference", "similarity"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        return json.dumps(record, allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ComparisonRow:
        """Parse a line of `per_prompt.jsonl`."""
        record = json.loads(line)
        reference, policy = (ImageScores.from_record(record, side) for side in SIDES)
        return cls(
            record["text"],
            record["seed"],
            reference,
            policy,
            record["prompt"],
            record["image"],
            record["category"],
            record.get("seed_reference"),
            record.get("similarity"),
        )


def read_rows(path: Path) -> list[ComparisonRow]:
    """Read the rows of a file."""
    with path.open(encoding="utf-8") as stream:
        return [ComparisonRow.from_line(line) for line in stream]


def number_or_none(values: Iterable[float]) -> list[float | None]:
    """Return values with None in place of NaN and infinity, for JSON."""
    return [None if math.isnan(value) else value for value in values]
