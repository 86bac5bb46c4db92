"""Choose the prompts that are held out of training, so that no prompt is on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from heapq import nsmallest
from pathlib import Path

from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.image_checks import digest
from lit_prefopt.prepare.records import read_text
from lit_prefopt.prepare.source_rows import BrokenRecord, RawRecord
from lit_prefopt.utils.atomic_files import atomic_output

TRAIN, VALIDATION = "train", "validation"  # folders of the two parts


def prompt_key(text: str) -> bytes:
    """Return a digest of a prompt that does not depend on its case and spaces."""
    return digest(" ".join(text.casefold().split()).encode())


def choose_held_out(rows: Iterable[RawRecord], columns: Columns, share: float) -> frozenset[bytes]:
    """Return the keys of the prompts to hold out: those with the smallest digests.

    The choice depends neither on the order of the records nor on a seed.

    Args:
        rows: The records of a source.
        columns: Column names of the source.
        share: Share of the prompts; at least one prompt is held out, and at least one is not.
    """
    keys = set()
    for row in rows:
        try:
            keys.add(prompt_key(read_text(row, columns)))
        except BrokenRecord:  # reported when the record is converted
            continue
    if len(keys) < 2:
        raise InputError(
            f"hold_out needs at least two prompts, and there are {len(keys)}; convert without it."
        )
    count = min(max(1, round(share * len(keys))), len(keys) - 1)
    return frozenset(nsmallest(count, keys))


@contextmanager
def open_writers(
    output: str, split: bool, max_count: int, max_size: int
) -> Iterator[tuple[Path, list[ShardWriter]]]:
    """Yield the folder and the writer of all pairs, or the writers of both parts.

    Args:
        output: Output folder.
        split: Whether it gets the folders train/ and validation/.
        max_count: Maximum number of pairs in a shard.
        max_size: Maximum size of a shard in bytes.
    """
    if not split:
        with ShardWriter(output, max_count, max_size) as writer:
            yield writer.folder, [writer]
        return
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{output} exists and is not empty; remove it or choose another.")
    with atomic_output(target) as folder:
        folder.mkdir()
        with ExitStack() as stack:
            parts = [
                stack.enter_context(ShardWriter(folder / name, max_count, max_size))
                for name in (TRAIN, VALIDATION)
            ]
            yield folder, parts
