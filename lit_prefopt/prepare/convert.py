"""Convert preference data to shards: read, check on all cores, drop pairs without a signal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.counts import ConversionSummary
from lit_prefopt.prepare.form_pairs import Matches, RecordPair, Ties, pairs_from_record
from lit_prefopt.prepare.image_checks import CheckedImage, digest, load_checked
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.prepare.records import BrokenRecord, Record, UnlabelledRecord, read_record
from lit_prefopt.prepare.source_rows import RawRecord
from lit_prefopt.prepare.sources import Format, open_source
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.output_lock import exclusive_output
from lit_prefopt.utils.parallel import map_in_order

SUMMARY = "summary.json"


class LoadedRecord(NamedTuple):
    """A record with its images, or the reason why it could not be loaded."""

    record: Record | None
    files: list[CheckedImage | str]  # an image, or its error
    reason: str = ""  # why there is no record; empty if the record only lacks a preference


def convert(
    source: str,
    output: str,
    format: Format = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
    pairs: Matches = "all",
    ties: Ties = "drop",
    image_folder: str | None = None,
    resolution: int | None = None,
    broken_share: float = 1.0,
    workers: int | None = None,
    max_count: int = 10_000,
    max_size: int = 1_000_000_000,
) -> ConversionSummary:
    """Convert preference data from tables, tars or folders to shards.

    A record is a pair in known order, a pair with a label, or a ranked list. Every image is fully
    decoded. Broken records are reported and skipped, as are duplicate pairs and pairs of two
    identical images; the counts are printed and saved as summary.json beside the shards.

    Args:
        source: A file (.json, .jsonl, .csv, .tsv, .parquet, .tar), several as a pattern with * or
            {000..099}, a folder of parquet files or tars, or a folder with chosen/ and rejected/
            in which both images of a pair have the same name, and the prompt is NAME.txt beside
            either image or in prompts/ or txt/.
        output: Output folder of the shards.
        format: Format of the source, if its file extension does not show it.
        columns: Column names of the source: a shipped set (pickapic, hpdv2, hpdv3,
            open-image-preferences), a YAML file, or single names as `--columns.prompt caption`.
        pairs: Pairs from a ranked list: all of them, or only the best against the worst image.
        ties: A tie is a pair of equal ranks, scores or votes, or with the label 0.5. drop skips
            ties. keep writes them with the label 0.5, in the order of the source. soft is keep
            with soft labels: a known probability (a label between 0 and 1, votes, opinions)
            becomes the pair's label, with the likelier image as chosen; a pair of which only the
            order is known stays unchanged. With drop and keep, probabilities only set the order.
        image_folder: Base folder of relative image paths; the source's folder by default.
        resolution: Count the images that are smaller than this and would be upscaled, in pixels.
        broken_share: Maximum share of broken records and images; 0 stops at the first one, 1 never.
        workers: Number of threads; by default one per core.
        max_count: Maximum number of pairs in a shard.
        max_size: Maximum size of a shard in bytes.
    """
    if not 0 <= broken_share <= 1:
        raise InputError(f"broken_share is {broken_share}; give a share from 0 to 1.")
    start, folder = time.perf_counter(), Path(image_folder) if image_folder else None
    rows, total = open_source(source, format, columns)
    maker = _PairMaker(pairs, ties, broken_share)
    with exclusive_output(output), ShardWriter(output, max_count, max_size) as writer:
        loaded = map_in_order(lambda row: _load(row, columns, folder), rows, workers)
        for record in progress(loaded, "records", total):
            for pair, text, files in maker.pairs(record):
                writer.add(text, files[0].data, files[1].data, pair.meta)
        summary = maker.summary
        if not summary.pairs:
            raise InputError(
                f"{source} has no usable pair: {_reason_for_none(summary)}; check images and "
                "columns."
            )
        metadata = json.dumps(summary.metadata(resolution), indent=2, ensure_ascii=False)
        write_atomic(writer.folder / SUMMARY, metadata + "\n")
    print(summary.summary(time.perf_counter() - start, resolution))
    return summary


class _PairMaker:
    """Forms pairs from loaded records and counts those that it skips."""

    def __init__(self, matches: Matches, ties: Ties, broken_share: float) -> None:
        self.matches, self.ties, self.broken_share = matches, ties, broken_share
        self.summary = ConversionSummary()
        self.seen: set[bytes] = set()  # about 100 bytes per pair

    def pairs(
        self, loaded: LoadedRecord
    ) -> Iterator[tuple[RecordPair, str, tuple[CheckedImage, CheckedImage]]]:
        """Yield the pairs to write."""
        self.summary.records += 1
        if loaded.record is None:
            if loaded.reason:
                self._broken(loaded.reason)
            else:
                self.summary.unlabelled += 1
            return
        self.summary.images += len(loaded.files)
        for file in loaded.files:
            if isinstance(file, str):
                self._broken(file)
        for pair in pairs_from_record(loaded.record, self.matches, self.ties):
            chosen, rejected = loaded.files[pair.chosen], loaded.files[pair.rejected]
            if isinstance(chosen, CheckedImage) and isinstance(rejected, CheckedImage):
                files = (chosen, rejected)
                if self._wanted(pair, loaded.record.text, files):
                    self.summary.pairs += 1
                    self.summary.sizes.add(chosen.size, rejected.size)
                    yield pair, loaded.record.text, files

    def _wanted(
        self, pair: RecordPair, text: str, files: tuple[CheckedImage, CheckedImage]
    ) -> bool:
        """Count a pair and return whether to write it."""
        summary = self.summary
        chosen, rejected = (file.digest for file in files)
        if chosen == rejected:
            summary.identical += 1
            return False
        summary.ties += pair.tie
        if pair.tie and self.ties == "drop":
            return False
        here = digest(text.encode(), chosen, rejected)
        opposed = digest(text.encode(), rejected, chosen)
        if here in self.seen or (pair.tie and opposed in self.seen):
            summary.duplicates += 1
            return False
        summary.opposed += opposed in self.seen
        summary.kept_ties += pair.tie
        self.seen.add(here)
        return True

    def _broken(self, name: str) -> None:
        broken, read = self.summary.broken, self.summary.records
        broken.add(name)
        allowed = max(ALWAYS_ALLOWED, self.broken_share * read) if self.broken_share else 0
        if self.broken_share < 1 and broken.count > allowed:
            raise InputError(
                f"Broken: {broken.count} in the first {read} records, more than the "
                f"{self.broken_share} that `broken_share` allows; repair or remove them: "
                f"{'; '.join(broken.lines())}."
            )


def _load(row: RawRecord, columns: Columns, folder: Path | None) -> LoadedRecord:
    try:
        record = read_record(row, columns, folder)
    except UnlabelledRecord:
        return LoadedRecord(None, [])
    except BrokenRecord as error:
        return LoadedRecord(None, [], f"{row.where} {error}")
    return LoadedRecord(record, [load_checked(picture) for picture in record.images])


def _reason_for_none(summary: ConversionSummary) -> str:
    """Return a short reason why no pair was written."""
    counts = {
        "ties": summary.ties,
        "pairs of identical images": summary.identical,
        "unlabelled": summary.unlabelled,
        "broken": summary.broken.count,
    }
    counted = [f"{count} {name}" for name, count in counts.items() if count]
    return "; ".join([", ".join(counted) or "it holds no record", *summary.broken.names[:3]])
