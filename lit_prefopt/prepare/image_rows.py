"""Group records with one image each into ranked lists, for tables with an image per row."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from lit_prefopt.prepare.cells import parse_number
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.source_rows import RawRecord

RATINGS = ("ranking", "scores", "votes")  # the first that a group has is used
OTHERS = ("images", "ranked", "chosen", "rejected", "first", "second")  # roles of whole records
MAX_HELD = 2_000_000_000  # bytes of images in memory


def group_images(rows: Iterator[RawRecord], columns: Columns) -> Iterator[RawRecord]:
    """Yield the records of a source, those with one image as lists of all images of a prompt.

    Paths are grouped over the whole source. Images that the source itself contains must have the
    rows of a prompt close to each other: the oldest groups are written when memory is full.

    Args:
        rows: The records.
        columns: Column names of the source.
    """
    groups, held, written = dict[str, list[RawRecord]](), 0, set[str]()
    for row in rows:
        group = _first(columns, row, "group", "prompt")
        if group is None or not _is_single(row, columns):
            yield row
            continue
        key = str(group).strip()
        if key in written:
            reason = "comes after other prompts; sort the rows by prompt"
            yield row._replace(values={}, reason=reason)
            continue
        groups.setdefault(key, []).append(row)
        held += _bytes(row, columns)
        while held > MAX_HELD and len(groups) > 1:
            oldest = next(iter(groups))
            held -= sum(_bytes(one, columns) for one in groups[oldest])
            written.add(oldest)
            yield from _merged(groups.pop(oldest), columns)
    for group in groups.values():
        yield from _merged(group, columns)


def _merged(rows: list[RawRecord], columns: Columns) -> Iterator[RawRecord]:
    """Yield one record for a group, and those of its rows that have no rating."""
    ratings = {role: [_rating(row, columns, role) for row in rows] for role in RATINGS}
    role = next((role for role in RATINGS if any(n is not None for n in ratings[role])), None)
    if role is None:
        names = " or ".join(map(columns.names_of, RATINGS))
        liked = any(columns.find("label", row.values) is not None for row in rows)
        cure = "; single images with likes are written by `--samples likes`" if liked else ""
        for row in rows:
            yield row._replace(reason=f"has no number under {names}{cure}; {row.names()}")
        return
    rated = []
    for row, rating in zip(rows, ratings[role], strict=True):
        if rating is None:
            yield row._replace(reason=f"has no number under {columns.names_of(role)}")
        else:
            rated.append((row, rating))
    first = rated[0][0]
    values = first.values | {
        columns.names("images")[0]: [columns.find("image", row.values) for row, _ in rated],
        columns.names(role)[0]: [rating for _, rating in rated],
    }
    yield first._replace(values=values)


def _is_single(row: RawRecord, columns: Columns) -> bool:
    if row.reason or columns.find("image", row.values) is None:
        return False
    return all(columns.find(role, row.values) is None for role in OTHERS)


def _first(columns: Columns, row: RawRecord, *roles: str) -> Any:
    found = (columns.find(role, row.values) for role in roles)
    return next((value for value in found if value is not None), None)


def _rating(row: RawRecord, columns: Columns, role: str) -> float | None:
    rating = parse_number(columns.find(role, row.values))
    return rating if rating is not None and isfinite(rating) else None


def _bytes(row: RawRecord, columns: Columns) -> int:
    cell = columns.find("image", row.values)
    cell = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(cell) if isinstance(cell, bytes | str) else 0
