"""Read tables of separated cells, as spreadsheets and scripts write them: CSV and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TextIO

from lit_prefopt.errors import InputError
from lit_prefopt.prepare.source_rows import RawRecord
from lit_prefopt.prepare.tables import open_text

DELIMITERS = (",", ";", "\t", "|")
MAX_LINES = 100  # of one row, whose cells may have line breaks


def separated(path: Path, delimiter: str, names: Set[str] = frozenset()) -> Iterator[RawRecord]:
    """Yield the records of a table whose first row names the columns.

    Args:
        path: The table.
        delimiter: Its usual delimiter; the header decides.
        names: Names of known columns, which the header may write in another case.
    """
    with open_text(path, newline="") as file:
        lines = _Lines(file)
        try:
            header, delimiter = _header(lines, delimiter, names)
        except csv.Error as error:
            raise InputError(
                f"{path} has no valid first row ({error}); it must name the columns."
            ) from error
        while True:
            start = lines.number + 1
            try:
                cells = _cells(lines, delimiter, len(header))
            except StopIteration:
                return
            except csv.Error as error:
                where = f"{path}, line {start}"
                yield RawRecord(where, {}, path.parent, f"is not a valid row ({error})")
                continue
            if cells:
                yield _record(f"{path}, line {lines.number}", header, cells, path)


class _Lines:
    """The lines of a file for one row at a time; all but the first can be put back."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.ahead = file, list[str]()
        self.row: list[str] = []  # the lines of the current row
        self.number = 0  # lines before the next one

    def __iter__(self) -> Iterator[str]:
        """Start a row and yield its lines."""
        self.row = []
        while len(self.row) < MAX_LINES:
            line = self.ahead.pop() if self.ahead else self.file.readline()
            if not line:
                return
            self.row.append(line)
            self.number += 1
            yield line

    def put_back(self) -> str:
        """Return the first line of the current row, and put the others back."""
        first, *others = self.row
        self.ahead += reversed(others)
        self.number -= len(others)
        return first


def _header(lines: _Lines, delimiter: str, names: Set[str]) -> tuple[list[str], str]:
    """Return the column names and the delimiter.

    It is the one that makes most of them known ones, else the usual one if it divides the header.
    """
    first = next(iter(lines), "")
    if first.startswith("sep=") and first[4:].strip("\r\n") in DELIMITERS:
        delimiter, first = first[4], next(iter(lines), "")  # a spreadsheet's own first line
    known = {name.lower(): name for name in names}
    found = {}
    for mark in dict.fromkeys((delimiter, *DELIMITERS)):
        cells = [cell.strip() for cell in next(csv.reader([first], delimiter=mark), [])]
        # Prompt is prompt, unless the table has both
        usual = [known.get(cell.lower(), cell) for cell in cells]
        found[mark] = [
            cell if other in cells else other for cell, other in zip(cells, usual, strict=True)
        ]
    best = max(found, key=lambda mark: (len(names & {*found[mark]}), len(found[mark]) > 1))
    return found[best], best


def _cells(lines: _Lines, delimiter: str, columns: int) -> list[str]:
    """Return the cells of the next row.

    A quote that does not close, or that belongs to the text, ends no later than its line: the row
    is then read without quoting, and the next row starts at the next line.
    """
    try:
        cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
        if len(lines.row) == 1 or len(cells) == columns:
            return cells
    except csv.Error:
        if not lines.row:
            raise
    first = lines.put_back()
    return next(csv.reader([first], delimiter=delimiter, quoting=csv.QUOTE_NONE))


def _record(where: str, header: list[str], cells: list[str], path: Path) -> RawRecord:
    columns = tuple(header)
    if len(cells) > len(header):
        reason = f"has {len(cells)} cells where the header names {len(header)} columns"
        return RawRecord(where, {}, path.parent, reason, columns)
    filled = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    return RawRecord(where, filled, path.parent, "", columns)
