"""Read text files of records: JSON, JSON lines, CSV and TSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.prepare.source_rows import RawRecord

CHUNK = 1 << 20  # characters read at a time
LARGEST = 64  # maximum chunks of one record; more means that the file is broken there


def json_lines(path: Path) -> Iterator[RawRecord]:
    """Yield the records of a file with one JSON mapping a line."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield _row(where, json.loads(line), path)
            except (ValueError, RecursionError) as error:
                yield RawRecord(where, {}, path.parent, f"is not JSON ({error})")


def json_file(path: Path) -> Iterator[RawRecord]:
    """Yield the records of a JSON file: a list of them, a single one, or one after the other.

    It is read in chunks, because published lists may not fit in memory.
    """
    number = 0
    try:
        for number, value in enumerate(json_values(path), 1):
            yield _row(f"{path}, record {number}", value, path)
    except InputError:
        raise
    except ValueError as error:  # the rest of the file is lost
        yield RawRecord(f"{path}, record {number + 1}", {}, path.parent, str(error))


def json_values(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list, or the values that stand one after the other.

    Raises:
        ValueError: The file is invalid JSON from some point on; the values before it were yielded.
    """
    with _open(path) as file:
        yield from _values(file)


def separated(path: Path, delimiter: str) -> Iterator[RawRecord]:
    """Yield the records of a table whose first row names the columns."""
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"{path}, line {reader.line_num}"
                yield RawRecord(where, {}, path.parent, f"is not a valid row ({error})")
                continue
            if header is None:
                header = cells
            elif cells:
                yield _cells(f"{path}, line {reader.line_num}", header, cells, path)


def _cells(where: str, header: list[str], cells: list[str], path: Path) -> RawRecord:
    if len(cells) > len(header):
        reason = f"has {len(cells)} cells where the header names {len(header)} columns"
        return RawRecord(where, {}, path.parent, reason)
    filled = zip(header, cells, strict=False)
    return RawRecord(where, {name: cell for name, cell in filled if cell}, path.parent)


def _row(where: str, value: Any, path: Path) -> RawRecord:
    if isinstance(value, dict):
        return RawRecord(where, value, path.parent)
    return RawRecord(where, {}, path.parent, "is not a mapping of names to values")


def _open(path: Path, newline: str | None = None) -> TextIO:
    try:
        # invalid UTF-8 becomes surrogates here, and is reported with its record later
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def _values(file: TextIO) -> Iterator[Any]:
    """Yield the elements of a list, or values that stand one after the other."""
    decoder, text, listed = json.JSONDecoder(), "", False
    while piece := file.read(CHUNK):
        text += piece
        if not listed and text.lstrip()[:1] == "[":
            text, listed = text.lstrip()[1:], True
        start = 0
        while True:
            start = _skip(text, start)
            try:
                value, start = decoder.raw_decode(text, start)
            except (json.JSONDecodeError, RecursionError):
                break  # incomplete or broken; decided at the end of the file
            yield value
        text = text[start:]
        if len(text) > LARGEST * CHUNK:
            break
    rest = text.strip(" \t\r\n,")
    if listed and not rest:
        raise ValueError("ends before its list is closed")
    if rest != ("]" if listed else ""):
        raise ValueError(f"is not JSON from {quoted(text.strip()[:40])} on")


def _skip(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n,":
        start += 1
    return start
