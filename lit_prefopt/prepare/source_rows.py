"""Raw rows of a source, one per record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 256_000_000  # maximum of one image or text


class RawRecord(NamedTuple):
    """One record as stored in the file, or the reason why it cannot be read."""

    where: str  # "pairs.jsonl, line 3", for messages
    values: dict[str, Any]
    folder: Path  # base folder of its relative paths
    reason: str = ""  # why it is broken; empty if it is not


class RecordSource(NamedTuple):
    """The records of a source."""

    rows: Iterator[RawRecord]
    total: int | None = None  # number of records, if it is known in advance
