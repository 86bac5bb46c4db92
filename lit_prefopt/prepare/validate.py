"""Looking at shards before a run does: what would stop it, what would harm it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.data.shards.format import INDEX, LATENTS, Shard
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.counts import ImageSizes, NamedCount
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.prepare.sample_checks import SampleFindings, SampleLocation, check_sample
from lit_prefopt.utils.filesystem import filesystem, is_local
from lit_prefopt.utils.parallel import map_in_order

SHOWN = 3  # names in a row of the table


@dataclass
class ValidationReport:
    """What was found in a folder of shards."""

    shards: int
    samples: int
    broken_share: float
    resolution: int | None
    broken: NamedCount = field(default_factory=NamedCount)  # a run puts others in their places
    odd: NamedCount = field(
        default_factory=NamedCount
    )  # pickles and what else does not belong here
    unlisted: NamedCount = field(default_factory=NamedCount)  # tars that the index does not know
    empty: NamedCount = field(default_factory=NamedCount)  # texts
    duplicates: NamedCount = field(default_factory=NamedCount)
    identical: NamedCount = field(default_factory=NamedCount)  # both sides are the same file
    unequal: NamedCount = field(default_factory=NamedCount)  # sides of different sizes
    sizes: ImageSizes = field(default_factory=ImageSizes)

    @property
    def would_stop(self) -> bool:
        """Whether a run would stop at these shards."""
        allowed = max(ALWAYS_ALLOWED, self.broken_share * self.samples) if self.broken_share else 0
        broken = self.broken.count
        return broken == self.samples or broken > allowed  # the former also where there are none

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the rows of the table: what, how many, and which ones or what it means."""
        findings = {
            "broken samples": self.broken,
            "odd members, never opened": self.odd,
            f"tars missing in {INDEX}": self.unlisted,
            "empty texts": self.empty,
            "duplicate pairs": self.duplicates,
            "identical sides": self.identical,
            "sides of unequal size": self.unequal,
        }
        for what, named in findings.items():
            more = [f"and {named.count - SHOWN} more"] if named.count > SHOWN else []
            yield what, str(named.count), "\n".join([*named.names[:SHOWN], *more])
        smallest, median, largest = self.sizes.smallest_median_largest()
        yield "shorter side", str(median), f"median; smallest {smallest}, largest {largest} pixels"
        if self.resolution is not None:
            share = f"{self.sizes.below(self.resolution):.1%}"
            yield f"below {self.resolution} pixels", share, "of the images would be enlarged"


def validate(
    shards: str,
    resolution: int | None = None,
    broken_share: float = 0.01,
    workers: int | None = None,
) -> ValidationReport:
    """Look at every sample of a folder of shards as a run would, and list what stops or harms one.

    Nothing is changed. The command ends with exit code 1 where a run would stop: without a fitting
    index.json, without samples, or with more broken samples than `broken_share` allows.

    Args:
        shards: Folder or URL of the shards, with their index.json.
        resolution: Tell the share of images that are smaller than this, in pixels.
        broken_share: Largest share of broken samples, as the run has it; 0 stops at the first one.
        workers: Threads; as many as there are cores if not given.
    """
    if not 0 <= broken_share <= 1:
        raise InputError(f"broken_share is {broken_share}; give a share from 0 to 1.")
    index = read_index(shards)
    cached = any(shard.kind == LATENTS for shard in index)
    latents = LatentSet.from_shards(LatentReader(index).check().shards) if cached else None
    report = ValidationReport(
        len(index), sum(len(s.offsets) for s in index), broken_share, resolution
    )
    for name in _unlisted(shards, index):
        report.unlisted.add(name)
    seen: set[bytes] = set()
    findings = map_in_order(check_sample, _places(index, latents), workers)
    for sample in progress(findings, "samples", report.samples):
        _note(report, sample, seen)
    _print(shards, report)
    if latents is not None:
        Console().print(f"They are {latents.summary}.")
    return report


def _note(report: ValidationReport, sample: SampleFindings, seen: set[bytes]) -> None:
    for member in sample.odd:
        report.odd.add(member)
    if sample.broken:
        report.broken.add(sample.broken)
        return
    report.sizes.add(*sample.sizes)
    found = {
        "empty": sample.empty,
        "identical": sample.identical,
        "duplicates": sample.digest in seen,
        "unequal": len(set(sample.sizes)) > 1,
    }
    for name in [name for name, is_so in found.items() if is_so]:
        getattr(report, name).add(sample.name)
    seen.add(sample.digest)


def _places(index: list[Shard], latents: LatentSet | None) -> Iterator[SampleLocation]:
    for shard in index:
        for sample in range(len(shard.offsets)):
            start, stop = shard.span(sample)
            yield SampleLocation(shard, sample, start if sample else 0, stop, latents)


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
    console = Console()
    console.print(table)
    verdict = "A run would stop here." if report.would_stop else "A run would not stop here."
    console.print(verdict)
