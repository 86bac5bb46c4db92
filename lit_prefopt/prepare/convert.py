"""Convert preference data to shards: read, check on all cores, drop pairs without a signal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ImageColor

from lit_prefopt.data.flatten import WHITE, Colour
from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError, check_number, printable, quoted
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.counts import ConversionSummary, NamedCount
from lit_prefopt.prepare.form_pairs import Matches, RecordPair, Ties, pairs_from_record
from lit_prefopt.prepare.hold_out import (
    TRAIN,
    VALIDATION,
    choose_held_out,
    open_writers,
    prompt_key,
)
from lit_prefopt.prepare.image_checks import CheckedImage, digest, load_checked
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.prepare.prompt_length import exceeds_context
from lit_prefopt.prepare.records import OddLabel, Record, read_record
from lit_prefopt.prepare.source_rows import (
    BrokenRecord,
    RawRecord,
    UnlabelledRecord,
)
from lit_prefopt.prepare.sources import Format, open_source
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.output_lock import exclusive_output
from lit_prefopt.utils.parallel import map_in_order

SUMMARY = "summary.json"
ODD_SHARE = 0.01  # share of labels outside 0 to 1 from which on the column has another scale


class LoadedRecord(NamedTuple):
    """A record with its images, or the reason why it could not be loaded."""

    record: Record | None
    files: list[CheckedImage | str]  # an image, or its error
    reason: str = ""  # why there is no record
    unlabelled: bool = False  # whether the record only lacks a preference
    odd_label: bool = False  # whether its label is a number, but no probability


def convert(
    source: str,
    output: str,
    format: Format = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
    pairs: Matches = "all",
    ties: Ties = "drop",
    image_folder: str | None = None,
    resolution: int | None = None,
    background: str = "white",
    broken_share: float = 1.0,
    hold_out: float = 0.0,
    workers: int | None = None,
    max_count: int = 10_000,
    max_size: int = 1_000_000_000,
) -> ConversionSummary:
    """Convert preference data from tables, tars or folders to shards.

    A record is a pair in known order, a pair with a label, a ranked list, or one image with its
    rank or score. Every image is fully decoded. Broken files, records and images are reported and
    skipped, as are duplicate pairs and pairs of two identical images; the counts are printed and
    saved as summary.json beside the shards.

    Args:
        source: A file (.json, .jsonl, .csv, .tsv, .parquet, .tar), several as a pattern with * or
            {000..099}, a folder of parquet files or tars, or a folder with chosen/ and rejected/
            in which both images of a pair have the same name, and the prompt is NAME.txt beside
            either image or in prompts/ or txt/. Of a folder or pattern with the files of several
            splits, such as train-*, validation-* and test-*, only the training split is read.
        output: Output folder of the shards; with `hold_out`, of the folders train and validation.
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
        background: Colour behind transparent images, such as black or #808080, on which they are
            stored as png. With white they are stored unchanged, since every command shows them on
            white.
        broken_share: Maximum share of broken records and images; 0 stops at the first one, 1 never.
        hold_out: Share of the prompts whose pairs are kept for validation, for example 0.05: the
            pairs are then written to OUTPUT/train and OUTPUT/validation, and no prompt is in both.
        workers: Number of threads; by default one per core.
        max_count: Maximum number of pairs in a shard.
        max_size: Maximum size of a shard in bytes.
    """
    check_number("broken_share", broken_share, 0, 1)
    check_number("hold_out", hold_out, 0)
    if hold_out >= 1:
        raise InputError(f"hold_out is {hold_out}; give a share below 1, for example 0.05.")
    check_number("resolution", resolution, 1, optional=True)
    check_number("max_count", max_count, 1)
    check_number("max_size", max_size, 1)
    colour = _colour(background)
    start, folder = time.perf_counter(), Path(image_folder) if image_folder else None
    if folder is not None and not os.path.isdir(folder):
        raise InputError(f"There is no folder {quoted(image_folder)}; check `image_folder`.")
    rows, total, notes = open_source(source, format, columns)
    for note in notes:
        print(printable(note))
    maker, held = _PairMaker(pairs, ties, broken_share), frozenset[bytes]()
    maker.summary.background = background
    opened = open_writers(output, hold_out > 0, max_count, max_size)
    with exclusive_output(output), opened as (target, writers):
        if hold_out:
            texts = open_source(source, format, columns, only={*columns.names("prompt")})
            held = choose_held_out(texts.rows, columns, hold_out)
        loaded = map_in_order(lambda row: _load(row, columns, folder, colour), rows, workers)
        for record in progress(loaded, "records", total):
            for pair, text, files in maker.pairs(record):
                writer = writers[prompt_key(text) in held]
                writer.add(text, files[0].data, files[1].data, pair.meta)
        summary = maker.summary
        maker.check_labels()
        if not summary.pairs:
            raise InputError(
                f"{source} has no usable pair: {_reason_for_none(summary, maker.unlabelled)}; "
                "check images and columns."
            )
        if held:
            summary.held_out_prompts, summary.held_out_pairs = len(held), writers[1].samples
            _check_parts(writers)
        metadata = json.dumps(summary.metadata(resolution), indent=2, ensure_ascii=False)
        write_atomic(target / SUMMARY, metadata + "\n")
    print(summary.summary(time.perf_counter() - start, resolution))
    return summary


def _check_parts(writers: list[ShardWriter]) -> None:
    for name, writer in zip((TRAIN, VALIDATION), writers, strict=True):
        if not writer.samples:
            raise InputError(
                f"The prompts for {name} have no usable pair; give `hold_out` another share."
            )


class _PairMaker:
    """Forms pairs from loaded records and counts those that it skips."""

    def __init__(self, matches: Matches, ties: Ties, broken_share: float) -> None:
        self.matches, self.ties, self.broken_share = matches, ties, broken_share
        self.summary = ConversionSummary()
        self.odd_labels = NamedCount()
        self.unlabelled = ""  # the first record without a preference
        self.seen: set[bytes] = set()  # about 100 bytes per pair

    def pairs(
        self, loaded: LoadedRecord
    ) -> Iterator[tuple[RecordPair, str, tuple[CheckedImage, CheckedImage]]]:
        """Yield the pairs to write."""
        self.summary.records += 1
        if loaded.odd_label:
            self.odd_labels.add(loaded.reason)
            if self.odd_labels.count > max(ALWAYS_ALLOWED, ODD_SHARE * self.summary.records):
                self.check_labels()
        if loaded.record is None:
            if not loaded.unlabelled:
                self._broken(loaded.reason)
            else:
                self.summary.unlabelled += 1
                self.unlabelled = self.unlabelled or loaded.reason
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
                    self.summary.transparent += chosen.transparent or rejected.transparent
                    self.summary.long_prompts += exceeds_context(loaded.record.text)
                    yield pair, loaded.record.text, files

    def check_labels(self) -> None:
        """Raise InputError if more labels than a few slips are no probabilities.

        Of a column with another scale, some values would pass, such as 0 for a tie.
        """
        if self.odd_labels.count > ODD_SHARE * self.summary.records:
            raise InputError(
                f"{self.odd_labels.names[0]}; write 1 where the first image is better, 0 where "
                "the second is, 0.5 for a tie, and leave the label empty where it is unknown."
            )

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


def _load(
    row: RawRecord, columns: Columns, folder: Path | None, background: Colour | None
) -> LoadedRecord:
    try:
        record = read_record(row, columns, folder)
    except UnlabelledRecord:
        reason = f"{row.where} has no preference under {columns.names_of('label')}; {row.names()}"
        return LoadedRecord(None, [], reason, unlabelled=True)
    except BrokenRecord as error:
        odd = isinstance(error, OddLabel)
        return LoadedRecord(None, [], f"{row.where} {error}", odd_label=odd)
    return LoadedRecord(record, [load_checked(one, background) for one in record.images])


def _colour(name: str) -> Colour | None:
    """Return a colour by its name; None for white, on which images are shown as they are."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError as error:
        raise InputError(
            f"background is {quoted(name)}; give a colour such as white or '#ffffff'."
        ) from error
    return None if (red, green, blue) == WHITE else (red, green, blue)


def _reason_for_none(summary: ConversionSummary, unlabelled: str) -> str:
    """Return a short reason why no pair was written.

    Args:
        summary: Statistics of the conversion.
        unlabelled: Description of the first record without a preference, if there is one.
    """
    counts = {
        "ties": summary.ties,
        "pairs of identical images": summary.identical,
        "unlabelled": summary.unlabelled,
        "broken": summary.broken.count,
    }
    counted = [f"{count} {name}" for name, count in counts.items() if count]
    examples = [*summary.broken.names[:3], *([unlabelled] if unlabelled else [])]
    return "; ".join([", ".join(counted) or "it holds no record", *examples])
