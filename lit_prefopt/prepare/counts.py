"""Statistics of a conversion or validation, in constant memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lit_prefopt.errors import printable
from lit_prefopt.prepare.prompt_length import CONTEXT

NAMED = 20  # broken files listed by name; the others are only counted


@dataclass
class NamedCount:
    """A count, with the names of the first items."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(printable(name))  # a file name may be invalid UTF-8, or a megabyte

    def lines(self) -> list[str]:
        """Return the names, one per line, and how many more there are."""
        more = self.count - len(self.names)
        return [*self.names, *([f"and {more} more"] if more else [])]


@dataclass
class ImageSizes:
    """Sizes of the images in the pairs; an image counts once per pair that contains it."""

    shorter: Counter[int] = field(default_factory=Counter)  # shorter side in pixels: images
    unequal: int = 0  # pairs whose sides have different sizes

    def add(self, *sizes: tuple[int, int]) -> None:
        """Count the images of a sample by width and height."""
        self.shorter.update(map(min, sizes))
        self.unequal += len(set(sizes)) > 1

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
    kind: str = "pairs"  # or lists, or likes
    pairs: int = 0  # samples of any kind
    lengths: Counter[int] = field(default_factory=Counter)  # number of lists by their images
    short: int = 0  # lists with fewer images than `list_size`; skipped
    liked: int = 0  # single images with the label 1
    ties: int = 0  # all, kept or skipped
    kept_ties: int = 0
    duplicates: int = 0  # skipped
    opposed: int = 0
    identical: int = 0  # both sides are the same file; skipped
    unlabelled: int = 0  # records without a preference; skipped
    images: int = 0  # all that were checked
    held_out_prompts: int = 0  # prompts whose pairs are kept for validation
    held_out_pairs: int = 0
    transparent: int = 0  # pairs with a transparent image
    background: str = "white"  # behind them
    long_prompts: int = 0  # pairs whose prompt is surely longer than CLIP's context
    broken: NamedCount = field(default_factory=NamedCount)  # records and images, with the reasons
    sizes: ImageSizes = field(default_factory=ImageSizes)

    def metadata(self, resolution: int | None = None) -> dict[str, Any]:
        """Return the content of summary.json, independent of machine and time."""
        counts = ("records", "pairs", "ties", "kept_ties", "duplicates", "opposed", "identical")
        held_out = {"prompts": self.held_out_prompts, "pairs": self.held_out_pairs}
        return {
            **self._of_kind(),
            **{name: getattr(self, name) for name in (*counts, "unlabelled", "images")},
            **({"held_out": held_out} if self.held_out_prompts else {}),
            "transparent": self.transparent,
            "long_prompts": self.long_prompts,
            "broken": {"count": self.broken.count, "first": self.broken.names},
            **self.sizes.metadata(resolution),
        }

    def _of_kind(self) -> dict[str, Any]:
        """Return what is counted only of lists, or only of likes."""
        if self.kind == "lists":
            lengths = {str(length): count for length, count in sorted(self.lengths.items())}
            return {"samples": "lists", "lists_by_length": lengths, "shorter_lists": self.short}
        if self.kind == "likes":
            disliked = self.pairs - self.liked
            return {"samples": "likes", "liked": self.liked, "disliked": disliked}
        return {}

    def _lines_of_kind(self) -> list[str]:
        """Return the lines of the summary that only lists or likes have."""
        if self.kind == "likes":
            return [f"{self.liked} liked, {self.pairs - self.liked} disliked"]
        if self.kind != "lists":
            return []
        lengths = [f"{n} of {length}" for length, n in sorted(self.lengths.items())]
        lines = [f"images in a list: {', '.join(lengths)}; {self.short} shorter lists left out"]
        if len(lengths) > 1:
            lines.append(
                "methods of lists need one length: convert again with `--list_size "
                f"{min(self.lengths)}` or more; methods of pairs take the best and the worst image"
            )
        return lines

    def summary(self, seconds: float, resolution: int | None = None) -> str:
        """Return the summary that is printed at the end."""
        smallest, median, largest = self.sizes.smallest_median_largest()
        ties = f"{self.ties} ties ({self.kept_ties} kept)"
        noun = {"pairs": "pairs", "lists": "ranked lists", "likes": "single images"}[self.kind]
        lines = [
            f"{self.pairs} {noun} from {self.records} records",
            f"left out: {self.ties - self.kept_ties} ties, {self.duplicates} duplicates, "
            f"{self.identical} with two identical images, {self.unlabelled} unlabelled, "
            f"{self.broken.count} broken",
            f"among them: {ties}, {self.opposed} opposed to a pair before, "
            f"{self.sizes.unequal} with sides of unequal size",
            f"shorter side: smallest {smallest}, median {median}, largest {largest} pixels",
        ]
        lines += self._lines_of_kind()
        if self.held_out_prompts:
            lines[0] += (
                f": {self.pairs - self.held_out_pairs} for train/, {self.held_out_pairs} of "
                f"{self.held_out_prompts} prompts for validation/"
            )
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
