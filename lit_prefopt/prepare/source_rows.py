"""What every source yields: one row for each record, as the file holds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 256_000_000  # of one image or text; more is no picture


class RawRecord(NamedTuple):
    """One record as the file holds it, or why it cannot be read."""

    where: str  # "pairs.jsonl, line 3", for messages
    values: dict[str, Any]
    folder: Path  # where its relative paths begin
    reason: str = ""  # why it is broken; nothing if it is not


class RecordSource(NamedTuple):
    """The records of a source."""

    rows: Iterator[RawRecord]
    total: int | None = None  # where it is known beforehand
