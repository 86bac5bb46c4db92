"""Read text files of records: JSON and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.prepare.encodings import encoding_of
from lit_prefopt.prepare.source_rows import RawRecord

CHUNK = 1 << 20  # characters read at a time
LARGEST = 64  # maximum chunks of one record; more means that the file is broken there


def json_lines(path: Path) -> Iterator[RawRecord]:
    """Yield the records of a file with one JSON mapping a line."""
    with open_text(path) as file:
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
    with open_text(path) as file:
        yield from _values(file)


def _row(where: str, value: Any, path: Path) -> RawRecord:
    if isinstance(value, dict):
        return RawRecord(where, value, path.parent)
    return RawRecord(where, {}, path.parent, "is not a mapping of names to values")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file in its own encoding; raise InputError if it cannot be read."""
    try:
        # invalid UTF-8 becomes surrogates here, and is reported with its record later
        return path.open(encoding=encoding_of(path), errors="surrogateescape", newline=newline)
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
