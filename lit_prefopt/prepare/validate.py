"""Validate shards before training: errors that would stop a run, and defects in the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_prefopt.data.images import Augment, BrokenSample
from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.data.shards.format import INDEX, LATENTS, Shard
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.sides import side_names
from lit_prefopt.errors import check_number
from lit_prefopt.prepare.counts import ImageSizes, NamedCount
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.prepare.prompt_length import CONTEXT
from lit_prefopt.prepare.sample_checks import SampleFindings, latent_set, look, places
from lit_prefopt.utils.filesystem import filesystem, is_local
from lit_prefopt.utils.parallel import map_in_order

SHOWN = 3  # names listed per row of the table


@dataclass
class ValidationReport:
    """Findings of a validation of shards."""

    shards: int
    samples: int
    broken_share: float
    resolution: int | None
    broken: NamedCount = field(default_factory=NamedCount)  # a run replaces them by others
    odd: NamedCount = field(default_factory=NamedCount)  # unexpected members such as pickles
    unlisted: NamedCount = field(default_factory=NamedCount)  # tars missing in the index
    empty: NamedCount = field(default_factory=NamedCount)  # texts
    long: NamedCount = field(default_factory=NamedCount)  # texts beyond CLIP's context
    transparent: NamedCount = field(default_factory=NamedCount)  # pairs with a transparent image
    duplicates: NamedCount = field(default_factory=NamedCount)
    identical: NamedCount = field(default_factory=NamedCount)  # both sides are the same file
    unequal: NamedCount = field(default_factory=NamedCount)  # sides of different sizes
    sizes: ImageSizes = field(default_factory=ImageSizes)
    sides: Counter[int] = field(default_factory=Counter)  # samples by their number of images
    liked: int = 0  # single images with the label 1
    unscored: NamedCount = field(default_factory=NamedCount)  # lists without a score of each image

    @property
    def would_stop(self) -> bool:
        """Whether training would stop with these shards."""
        allowed = max(ALWAYS_ALLOWED, self.broken_share * self.samples) if self.broken_share else 0
        broken = self.broken.count
        return broken == self.samples or broken > allowed  # the first also if there are none

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the rows of the table: finding, count, and details."""
        findings = {
            "broken samples": self.broken,
            "unexpected members, never opened": self.odd,
            f"tars missing in {INDEX}": self.unlisted,
            "empty texts": self.empty,
            f"texts of more than {CONTEXT} tokens": self.long,
            "transparent, shown on white": self.transparent,
            f"duplicate {self._noun}": self.duplicates,
            "identical sides": self.identical,
            "sides of unequal size": self.unequal,
        }
        if max(self.sides, default=0) > 2:
            findings["lists without scores, which some methods need"] = self.unscored
        for what, named in findings.items():
            more = [f"and {named.count - SHOWN} more"] if named.count > SHOWN else []
            yield what, str(named.count), "\n".join([*named.names[:SHOWN], *more])
        yield from self._rows_of_sides()
        smallest, median, largest = self.sizes.smallest_median_largest()
        yield "shorter side", str(median), f"median; smallest {smallest}, largest {largest} pixels"
        if self.resolution is not None:
            share = f"{self.sizes.below(self.resolution):.1%}"
            yield f"below {self.resolution} pixels", share, "of the images would be upscaled"

    @property
    def _noun(self) -> str:
        """What the samples are."""
        return "samples" if set(self.sides) - {2} else "pairs"

    def _rows_of_sides(self) -> Iterator[tuple[str, str, str]]:
        """Yield the rows that only samples of other kinds than pairs have."""
        if singles := self.sides[1]:
            liked = f"{self.liked} liked, {singles - self.liked} disliked"
            yield "single images", str(singles), liked
        lists = {count: number for count, number in sorted(self.sides.items()) if count > 2}
        if lists:
            lengths = ", ".join(f"{number} of {count}" for count, number in lists.items())
            yield "ranked lists", str(sum(lists.values())), f"images in a list: {lengths}"
        if len(self.sides) > 1:
            single = " apart from single images" if self.sides[1] else ""
            cure = f"methods of lists need lists of one length{single}"
            yield "different numbers of images", str(len(self.sides)), cure


def validate(
    shards: str,
    resolution: int | None = None,
    broken_share: float = 0.01,
    workers: int | None = None,
) -> ValidationReport:
    """Check every sample of a folder of shards, and list errors and defects.

    Nothing is changed. The exit code is 1 if training would stop: without a matching index.json,
    without samples, or with more broken samples than `broken_share` allows.

    Args:
        shards: Folder or URL of the shards, with their index.json.
        resolution: Of the training, in pixels: report the share of images that are smaller, and
            as broken the pairs that are too long and narrow for it.
        broken_share: Maximum share of broken samples, as in training; 0 stops at the first one.
        workers: Number of threads; by default one per core.
    """
    check_number("broken_share", broken_share, 0, 1)
    check_number("resolution", resolution, 1, optional=True)
    index = read_index(shards)
    cached = any(shard.kind == LATENTS for shard in index)
    latents = latent_set(index) if cached else None
    report = ValidationReport(
        len(index), sum(len(s.offsets) for s in index), broken_share, resolution
    )
    for name in _unlisted(shards, index):
        report.unlisted.add(name)
    seen: set[bytes] = set()
    findings = map_in_order(look, places(index, latents), workers)
    for sample in progress(findings, "samples", report.samples):
        _note(report, sample, seen)
    _print(shards, report)
    if latents is not None:
        Console(markup=False).print(f"Cached latents: {latents.summary}.")
    return report


def _note(report: ValidationReport, sample: SampleFindings, seen: set[bytes]) -> None:
    for member in sample.odd:
        report.odd.add(member)
    broken = sample.broken or _too_narrow(sample, report.resolution)
    if broken:
        report.broken.add(broken)
        return
    report.sizes.add(*sample.sizes)
    report.sides[len(sample.sizes)] += 1
    report.liked += sample.liked
    if len(sample.sizes) > 2 and not sample.scored:
        report.unscored.add(sample.name)
    found = {
        "empty": sample.empty,
        "long": sample.long,
        "transparent": sample.transparent,
        "identical": sample.identical,
        "duplicates": sample.digest in seen,
        "unequal": len(set(sample.sizes)) > 1,
    }
    for name in [name for name, is_so in found.items() if is_so]:
        getattr(report, name).add(sample.name)
    seen.add(sample.digest)


def _too_narrow(sample: SampleFindings, resolution: int | None) -> str:
    """Return why a sample cannot be resized to a resolution, or nothing."""
    if resolution is None:
        return ""
    try:
        Augment((resolution, resolution)).draw(sample.sizes[0], seed=0)
    except BrokenSample as error:
        return f"{sample.name}: {side_names(len(sample.sizes))[0]} {error}"
    return ""


def _unlisted(folder: str, index: list[Shard]) -> list[str]:
    fs, path = filesystem(folder.rstrip("/"))
    if not is_local(fs):  # many remote folders cannot be listed
        return []
    known = {shard.name for shard in index}
    return sorted(tar.name for tar in Path(path).glob("*.tar") if tar.name not in known)


def _print(shards: str, report: ValidationReport) -> None:
    table = Table("finding", "count", "which", title=f"{shards}: {report.samples} samples")
    for row in report.rows():
        table.add_row(*row)
    console = Console(markup=False)  # a name may look like it, such as [/bold]
    console.print(table)
    verdict = "Training would stop." if report.would_stop else "Training would not stop."
    console.print(verdict)
