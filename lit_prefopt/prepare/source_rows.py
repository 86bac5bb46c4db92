"""Raw rows of a source, one per record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_prefopt.errors import quoted

MAX_BYTES = 256_000_000  # maximum of one image or text
MAX_LISTED = 12  # names in a message


class BrokenRecord(ValueError):
    """A record that cannot be used, with the reason."""


class UnlabelledRecord(ValueError):
    """A record without a preference."""


class RawRecord(NamedTuple):
    """One record as stored in the file, or the reason why it cannot be read."""

    where: str  # "pairs.jsonl, line 3", for messages
    values: dict[str, Any]
    folder: Path  # base folder of its relative paths
    reason: str = ""  # why it is broken; empty if it is not
    columns: tuple[str, ...] = ()  # all columns or members of the source, if some are not read

    def names(self) -> str:
        """Return the end of a message with the columns that the record has."""
        names = self.columns or tuple(self.values)
        return f"it has {listed(map(quoted, names)) or 'nothing'}"


class RecordSource(NamedTuple):
    """The records of a source."""

    rows: Iterator[RawRecord]
    total: int | None = None  # number of records, if it is known in advance
    notes: tuple[str, ...] = ()  # what a user must know about the choice of files


def listed(names: Iterable[str]) -> str:
    """Return the first names of a list, separated by commas, and how many more there are."""
    all_names = list(names)
    more = len(all_names) - MAX_LISTED
    shown = ", ".join(all_names[:MAX_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown
