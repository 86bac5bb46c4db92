"""Convert preference data to shards: read, check on all cores, drop pairs without a signal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from PIL import ImageColor

from lit_prefopt.data.flatten import WHITE, Colour
from lit_prefopt.data.shards.format import MOST_SIDES
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError, check_number, printable, quoted
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.counts import ConversionSummary
from lit_prefopt.prepare.form_pairs import Matches, Ties
from lit_prefopt.prepare.form_samples import Samples
from lit_prefopt.prepare.hold_out import (
    TRAIN,
    VALIDATION,
    choose_held_out,
    open_writers,
    prompt_key,
)
from lit_prefopt.prepare.image_checks import load_checked
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.prepare.records import OddLabel, read_record
from lit_prefopt.prepare.sample_maker import LoadedRecord, SampleMaker
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
USABLE = {"pairs": "pair", "lists": "list", "likes": "image"}


def convert(
    source: str,
    output: str,
    format: Format = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
    pairs: Matches = "all",
    ties: Ties = "drop",
    samples: Samples = "pairs",
    list_size: int | None = None,
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
    rank or score, or with a like or dislike. Every image is fully decoded. Broken files, records
    and images are reported and skipped, as are duplicates, and pairs and lists with two identical
    images; the counts are printed and saved as summary.json beside the shards.

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
        samples: What is written: `pairs`; `lists`, each record as one ranked list with a score for
            each image, for methods that compare all of them; or `likes`, single images with the
            label 1 (liked) or 0 (disliked), for methods without pairs.
        list_size: With `lists`, the number of images of each: of a longer list the best, the worst
            and those at even steps between are written, and a shorter one is left out and counted.
            All images of every list by default.
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
    check_number("list_size", list_size, 2, MOST_SIDES, optional=True)
    if list_size is not None and samples != "lists":
        raise InputError(f"`list_size` is the length of lists, not of {samples}: leave it out.")
    check_number("max_count", max_count, 1)
    check_number("max_size", max_size, 1)
    colour = _colour(background)
    start, folder = time.perf_counter(), Path(image_folder) if image_folder else None
    if folder is not None and not os.path.isdir(folder):
        raise InputError(f"There is no folder {quoted(image_folder)}; check `image_folder`.")
    grouped = samples != "likes"
    rows, total, notes = open_source(source, format, columns, grouped=grouped)
    for note in notes:
        print(printable(note))
    maker = SampleMaker(samples, pairs, ties, list_size, broken_share)
    held = frozenset[bytes]()
    maker.summary.background = background
    opened = open_writers(output, hold_out > 0, max_count, max_size)
    with exclusive_output(output), opened as (target, writers):
        if hold_out:
            only = {*columns.names("prompt")}
            texts = open_source(source, format, columns, only, grouped=grouped)
            held = choose_held_out(texts.rows, columns, hold_out)
        loaded = map_in_order(lambda row: _load(row, columns, folder, colour), rows, workers)
        for record in progress(loaded, "records", total):
            for sample, text, files in maker.samples(record):
                writer = writers[prompt_key(text) in held]
                writer.add_sides(text, [file.data for file in files], sample.meta)
        summary = maker.summary
        maker.check_labels()
        if not summary.pairs:
            reason = _reason_for_none(summary, maker.unlabelled)
            raise InputError(
                f"{source} has no usable {USABLE[samples]}: {reason}; check images and columns."
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
        "lists shorter than `list_size`": summary.short,
        "broken": summary.broken.count,
    }
    counted = [f"{count} {name}" for name, count in counts.items() if count]
    examples = [*summary.broken.names[:3], *([unlabelled] if unlabelled else [])]
    return "; ".join([", ".join(counted) or "it holds no record", *examples])
