"""Statistics of a conversion or validation, in constant memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lit_prefopt.prepare.prompt_length import CONTEXT

NAMED = 20  # broken files listed by name; the others are only counted
LONGEST = 1000  # characters of a name


def shorten(name: str) -> str:
    """Return a name of bounded length, with its end, which has the reason."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[-LONGEST // 2 :]}"


@dataclass
class NamedCount:
    """A count, with the names of the first items."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.names) < NAMED:
            # a file name may be invalid UTF-8, printed text may not
            self.names.append(shorten(name.encode(errors="backslashreplace").decode()))

    def lines(self) -> list[str]:
        """Return the names, one per line, and how many more there are."""
        more = self.count - len(self.names)
        return [*self.names, *([f"and {more} more"] if more else [])]


@dataclass
class ImageSizes:
    """Sizes of the images in the pairs; an image counts once per pair that contains it."""

    shorter: Counter[int] = field(default_factory=Counter)  # shorter side in pixels: images
    unequal: int = 0  # pairs whose sides have different sizes

    def add(self, chosen: tuple[int, int], rejected: tuple[int, int]) -> None:
        """Count the two images of a pair by width and height."""
        self.shorter.update((min(chosen), min(rejected)))
        self.unequal += chosen != rejected

    @property
    def images(self) -> int:
        """Number of images counted."""
        return self.shorter.total()

    def smallest_median_largest(self) -> tuple[int, int, int]:
        """Return the smallest, median (lower) and largest shorter side in pixels."""
        seen = 0
        for side in sorted(self.shorter):
            seen += self.shorter[side]
            if 2 * seen >= self.images:
                return min(self.shorter), side, max(self.shorter)
        return 0, 0, 0

    def below(self, resolution: int) -> float:
        """Return the share of images that would be upscaled to a resolution in pixels."""
        small = sum(count for side, count in self.shorter.items() if side < resolution)
        return small / max(1, self.images)

    def metadata(self, resolution: int | None) -> dict[str, Any]:
        """Return the statistics as a dictionary with readable keys."""
        smallest, median, largest = self.smallest_median_largest()
        metadata: dict[str, Any] = {
            "shorter_side": {"smallest": smallest, "median": median, "largest": largest},
            "unequal_sides": self.unequal,
        }
        if resolution is not None:
            metadata["resolution"] = resolution
            metadata["share_below_resolution"] = round(self.below(resolution), 6)
        return metadata


@dataclass
class ConversionSummary:
    """Statistics of a conversion.

    A duplicate has the same prompt, the same chosen and the same rejected image, byte for byte, as
    an earlier pair; an opposed pair has them the other way round, and is kept as a second opinion.
    """

    records: int = 0
    pairs: int = 0
    ties: int = 0  # all, kept or skipped
    kept_ties: int = 0
    duplicates: int = 0  # skipped
    opposed: int = 0
    identical: int = 0  # both sides are the same file; skipped
    unlabelled: int = 0  # records without a preference; skipped
    images: int = 0  # all that were checked
    transparent: int = 0  # pairs with a transparent image
    background: str = "white"  # behind them
    long_prompts: int = 0  # pairs whose prompt is surely longer than CLIP's context
    broken: NamedCount = field(default_factory=NamedCount)  # records and images, with the reasons
    sizes: ImageSizes = field(default_factory=ImageSizes)

    def metadata(self, resolution: int | None = None) -> dict[str, Any]:
        """Return the content of summary.json, independent of machine and time."""
        counts = ("records", "pairs", "ties", "kept_ties", "duplicates", "opposed", "identical")
        return {
            **{name: getattr(self, name) for name in (*counts, "unlabelled", "images")},
            "transparent": self.transparent,
            "long_prompts": self.long_prompts,
            "broken": {"count": self.broken.count, "first": self.broken.names},
            **self.sizes.metadata(resolution),
        }

    def summary(self, seconds: float, resolution: int | None = None) -> str:
        """Return the summary that is printed at the end."""
        smallest, median, largest = self.sizes.smallest_median_largest()
        ties = f"{self.ties} ties ({self.kept_ties} kept)"
        lines = [
            f"{self.pairs} pairs from {self.records} records",
            f"left out: {self.ties - self.kept_ties} ties, {self.duplicates} duplicates, "
            f"{self.identical} with two identical images, {self.unlabelled} unlabelled, "
            f"{self.broken.count} broken",
            f"among them: {ties}, {self.opposed} opposed to a pair before, "
            f"{self.sizes.unequal} with sides of unequal size",
            f"shorter side: smallest {smallest}, median {median}, largest {largest} pixels",
        ]
        if self.transparent:
            lines.append(
                f"{self.transparent} pairs have a transparent image, shown on {self.background}"
            )
        if self.long_prompts:
            lines.append(
                f"{self.long_prompts} pairs or more have a prompt that is longer than the "
                f"{CONTEXT} tokens of CLIP's text encoders and would be truncated"
            )
        if resolution is not None:
            share = f"{self.sizes.below(resolution):.1%}"
            lines.append(f"{share} of the images are below {resolution} and would be upscaled")
        rate = self.images / max(seconds, 1e-9)
        lines.append(f"{self.images} images checked in {seconds:.1f} s: {rate:.0f} images/s")
        return "\n".join([*lines, *(f"broken: {line}" for line in self.broken.lines())])
