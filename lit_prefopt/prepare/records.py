"""Parse rows into records: prompt, images, and their order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

from lit_prefopt.errors import quoted
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.source_rows import RawRecord


class BrokenRecord(ValueError):
    """A record that cannot be used, with the reason."""


class UnlabelledRecord(ValueError):
    """A record without a preference."""


class ImageSource(NamedTuple):
    """One image of a source, by path or by bytes."""

    name: str  # for messages
    path: Path | None  # the file, if the bytes are not in `data`
    data: bytes = b""


class Record(NamedTuple):
    """One prompt, its images, and their ratings."""

    where: str
    text: str
    images: list[ImageSource]
    worths: list[float]  # one for each image, higher is better
    ratings: dict[str, list[float]]  # ranks and scores as in the source
    votes: list[float]  # for each image; none if unknown
    opinions: list[list[float]]  # rankings of the images, one per annotator
    weight: float | None = None  # of its pairs, if it is known

    def probability(self, one: int, other: int) -> float | None:
        """Return the share of annotators who prefer one image to another, if it is known."""
        if self.opinions:
            wins = [_win(ranks[other] - ranks[one]) for ranks in self.opinions]
            return sum(wins) / len(wins)
        if self.votes and self.votes[one] + self.votes[other] > 0:
            return self.votes[one] / (self.votes[one] + self.votes[other])
        return None


def read_record(row: RawRecord, columns: Columns, folder: Path | None = None) -> Record:
    """Parse a row into a record; raise BrokenRecord or UnlabelledRecord if it has no preference.

    Args:
        row: A row of the source.
        columns: Column names of the source.
        folder: Base folder of relative image paths; the row's own folder by default.
    """
    if row.reason:
        raise BrokenRecord(row.reason)
    if not _truth(columns.find("labelled", row.values)):
        raise UnlabelledRecord
    text = _text(row, columns)
    for role, read in (("images", _ranked), ("first", _labelled), ("chosen", _ordered)):
        if columns.find(role, row.values) is not None:
            record = read(row, columns, text, folder or row.folder)
            return record._replace(weight=_weight(row, columns))
    second = columns.find("second", row.values) is not None
    if second or columns.find("rejected", row.values) is not None:
        raise BrokenRecord(
            f"has no image under {columns.names_of('first' if second else 'chosen')}"
        )
    raise BrokenRecord(
        f"has no image: neither under {columns.names_of('images')} nor "
        f"{columns.names_of('chosen')} nor {columns.names_of('first')}; it has "
        f"{', '.join(map(quoted, row.values)) or 'nothing'}"
    )


def _text(row: RawRecord, columns: Columns) -> str:
    text = columns.find("prompt", row.values)
    if not isinstance(text, str):
        raise BrokenRecord(f"has no text under {columns.names_of('prompt')}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord("has a text that is not UTF-8") from error
    if not text.strip():
        raise BrokenRecord("has an empty text")
    return text.strip()  # without the line break at the end of a text file


def _ordered(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    images = _sides(row, columns, ("chosen", "rejected"), folder)
    votes = _numbers(columns.find("votes", row.values), 2, columns.names_of("votes"))
    # the source orders the pair, the better side first; the order of its votes is undefined
    return Record(row.where, text, images, [1, 0], {}, sorted(votes, reverse=True), [])


def _labelled(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    images = _sides(row, columns, ("first", "second"), folder)
    value = columns.find("label", row.values)
    label = _number(value)
    if value is None or (label is not None and label != label):  # NaN: an empty cell of a table
        raise UnlabelledRecord
    if label is None or not 0 <= label <= 1:
        raise BrokenRecord(f"has the label {quoted(value)}, which is not a number from 0 to 1")
    return Record(row.where, text, images, [label, 1 - label], {}, [label, 1 - label], [])


def _ranked(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    cells = columns.find("images", row.values)
    if not isinstance(cells, Sequence) or isinstance(cells, str | bytes):
        raise BrokenRecord(f"has no list of images under {columns.names_of('images')}")
    images = [_picture(cell, f"{row.where}, image {n}", folder) for n, cell in enumerate(cells, 1)]
    ranks, scores, votes = (
        _numbers(columns.find(role, row.values), len(images), columns.names_of(role))
        for role in ("ranking", "scores", "votes")
    )
    ratings = {name: given for name, given in (("ranks", ranks), ("scores", scores)) if given}
    worths = [-rank for rank in ranks] or scores or votes
    if not worths:
        roles = map(columns.names_of, ("ranking", "scores", "votes"))
        raise BrokenRecord(f"has a list of images but no order under {', '.join(roles)}")
    opinions = _opinions(row, columns, len(images))
    return Record(row.where, text, images, worths, ratings, votes, opinions)


def _weight(row: RawRecord, columns: Columns) -> float | None:
    """Return one over the number of records that share the prompt, None if it is unknown."""
    value = columns.find("examples", row.values)
    if value is None:
        return None
    count = _number(value)
    if count is None or not 1 <= count < inf:
        name = columns.names_of("examples")
        raise BrokenRecord(f"has {quoted(value)} under {name}, which is not a count")
    return 1 / count


def _opinions(row: RawRecord, columns: Columns, count: int) -> list[list[float]]:
    """Return the annotators' rankings: lists, or mappings that contain the ranking."""
    given = columns.find("opinions", row.values) or []
    if not isinstance(given, list):
        raise BrokenRecord(f"has no list of rankings under {columns.names_of('opinions')}")
    rankings = [columns.find("ranking", one) if isinstance(one, dict) else one for one in given]
    return [_numbers(ranks or [], count, columns.names_of("opinions")) for ranks in rankings]


def _sides(
    row: RawRecord, columns: Columns, roles: Sequence[str], folder: Path
) -> list[ImageSource]:
    pictures = []
    for role in roles:
        cell = columns.find(role, row.values)
        if cell is None:
            raise BrokenRecord(f"has no image under {columns.names_of(role)}")
        pictures.append(_picture(cell, f"{row.where}, {role} image", folder))
    return pictures


def _picture(cell: Any, name: str, folder: Path) -> ImageSource:
    if isinstance(cell, dict):  # the datasets library's format of an image
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return ImageSource(name, None, cell)
    if not isinstance(cell, str) or not cell or not _nameable(cell):
        raise BrokenRecord(f"has neither a path nor bytes for an image ({name})")
    if "://" in cell:
        raise BrokenRecord(f"has the remote image {quoted(cell)}; download it first")
    return ImageSource(str(folder / cell), folder / cell)


def _nameable(path: str) -> bool:
    """Return whether a path is a valid file name."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _numbers(values: Any, count: int, name: str) -> list[float]:
    """Return one finite number per image, or an empty list for None."""
    if values is None:
        return []
    numbers = [_number(value) for value in values] if isinstance(values, Sequence) else []
    finite = [number for number in numbers if number is not None and isfinite(number)]
    if len(finite) != count or len(numbers) != count:
        raise BrokenRecord(f"does not have one number for each of {count} images under {name}")
    return finite


def _number(value: Any) -> float | None:
    """Parse a number, which a table may store as text."""
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _truth(value: Any) -> bool:
    return value is None or str(value).strip().lower() not in ("false", "0", "0.0", "no")


def _win(ahead: float) -> float:
    return 0.5 if ahead == 0 else float(ahead > 0)
