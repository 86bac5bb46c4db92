"""Parse rows into records: prompt, images, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from lit_prefopt.errors import quoted
from lit_prefopt.prepare.cells import (
    ImageSource,
    image_source,
    list_of_cells,
    parse_number,
    parse_numbers,
    truth,
)
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.encodings import decode_text
from lit_prefopt.prepare.source_rows import (
    BrokenRecord,
    RawRecord,
    UnlabelledRecord,
)

LIKES = {
    **{"true": 1, "yes": 1, "like": 1, "liked": 1, "exclusive_win": 1},
    **{"false": 0, "no": 0, "dislike": 0, "disliked": 0, "exclusive_lose": 0},
}
"""Labels of single images in words; the last of each are those of Diffusion-KTO's released code."""

BYTE_ORDER_MARK = "\ufeff"  # which Windows' Notepad writes before a text


class OddLabel(BrokenRecord):
    """A label that is a number but no probability: the column may have another scale."""


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
    if not truth(columns.find("labelled", row.values)):
        raise UnlabelledRecord
    text = read_text(row, columns)
    for role, read in READERS.items():
        if columns.find(role, row.values) is not None:
            record = read(row, columns, text, folder or row.folder)
            return record._replace(weight=_weight(row, columns))
    second = columns.find("second", row.values) is not None
    if second or columns.find("rejected", row.values) is not None:
        side = columns.names_of("first" if second else "chosen")
        raise BrokenRecord(f"has no image under {side}; {row.names()}")
    raise BrokenRecord(
        f"has no image: neither under {columns.names_of('images')} nor "
        f"{columns.names_of('chosen')} nor {columns.names_of('first')} nor "
        f"{columns.names_of('image')}; {row.names()}"
    )


def read_text(row: RawRecord, columns: Columns) -> str:
    """Return the prompt of a row; raise BrokenRecord if it has none."""
    text = columns.find("prompt", row.values)
    if isinstance(text, bytes):
        text = decode_text(text)
    if not isinstance(text, str):
        raise BrokenRecord(f"has no text under {columns.names_of('prompt')}; {row.names()}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord("has a text that is not UTF-8") from error
    # without the mark before and the line break after the text of a file
    text = text.strip().removeprefix(BYTE_ORDER_MARK).strip()
    if not text:
        raise BrokenRecord("has an empty text")
    return text


def _ordered(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    images = _sides(row, columns, ("chosen", "rejected"), folder)
    votes = parse_numbers(columns.find("votes", row.values), 2, columns.names_of("votes"))
    label = parse_number(columns.find("label", row.values))
    if label == 0.5:  # a tie, as our own shards store it
        return Record(row.where, text, images, [0.5, 0.5], {}, votes or [0.5, 0.5], [])
    if label is not None and 0.5 < label < 1 and not votes:
        votes = [label, 1 - label]
    # the source orders the pair, the better side first; the order of its votes is undefined
    return Record(row.where, text, images, [1, 0], {}, sorted(votes, reverse=True), [])


def _labelled(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    images = _sides(row, columns, ("first", "second"), folder)
    value = columns.find("label", row.values)
    label = parse_number(value)
    if value is None or (label is not None and label != label):  # NaN: an empty cell of a table
        raise UnlabelledRecord
    if label is None:
        raise BrokenRecord(f"has the label {quoted(value)}, which is not a number from 0 to 1")
    if not 0 <= label <= 1:
        raise OddLabel(f"has the label {label:g}, which is not a number from 0 to 1")
    return Record(row.where, text, images, [label, 1 - label], {}, [label, 1 - label], [])


def _ranked(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    cells = list_of_cells(columns.find("images", row.values))
    if cells is None:
        raise BrokenRecord(f"has no list of images under {columns.names_of('images')}")
    return _rated(row, columns, text, cells, folder)


def _in_columns(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    """Return the record of a list whose images are in columns in the order of their ranks."""
    found = [row.values.get(name) for name in columns.names("ranked")]
    cells = [cell for cell in found if cell is not None]
    return _rated(row, columns, text, cells, folder, ranks=[*range(1, len(cells) + 1)])


def _rated(
    row: RawRecord,
    columns: Columns,
    text: str,
    cells: Sequence[Any],
    folder: Path,
    ranks: Sequence[float] = (),
) -> Record:
    if len(cells) < 2:
        raise BrokenRecord(f"has {len(cells)} image, and a pair needs two")
    images = [
        image_source(cell, f"{row.where}, image {place}", folder)
        for place, cell in enumerate(cells, 1)
    ]
    given, scores, votes = (
        parse_numbers(columns.find(role, row.values), len(images), columns.names_of(role))
        for role in ("ranking", "scores", "votes")
    )
    ranks = given or [*ranks]
    ratings = {name: one for name, one in (("ranks", ranks), ("scores", scores)) if one}
    worths = [-rank for rank in ranks] or scores or votes
    if not worths:
        roles = map(columns.names_of, ("ranking", "scores", "votes"))
        raise BrokenRecord(
            f"has a list of images but no order under {', '.join(roles)}; {row.names()}"
        )
    opinions = _opinions(row, columns, len(images))
    return Record(row.where, text, images, worths, ratings, votes, opinions)


def _liked(row: RawRecord, columns: Columns, text: str, folder: Path) -> Record:
    """Return the record of one image that is liked or not."""
    image = image_source(columns.find("image", row.values), f"{row.where}, image", folder)
    value = columns.find("label", row.values)
    label = parse_number(value)
    if value is None or (label is not None and label != label):  # NaN: an empty cell of a table
        raise UnlabelledRecord
    if label is None:
        label = LIKES.get(str(value).strip().lower())
    if label is None:
        raise BrokenRecord(f"has the label {quoted(value)}, which is neither 1 (liked) nor 0")
    if label not in (0, 1):
        raise OddLabel(f"has the label {label:g}, which is neither 1 (liked) nor 0 (disliked)")
    score = parse_numbers(columns.find("scores", row.values), 1, columns.names_of("scores"))
    ratings = {"scores": score} if score else {}
    return Record(row.where, text, [image], [label], ratings, [], [])


READERS = {
    "images": _ranked,
    "ranked": _in_columns,
    "first": _labelled,
    "chosen": _ordered,
    "image": _liked,
}
"""Readers of a record by the role that it has: the first that it has decides."""


def _weight(row: RawRecord, columns: Columns) -> float | None:
    """Return one over the number of records that share the prompt, None if it is unknown."""
    value = columns.find("examples", row.values)
    if value is None:
        return None
    count = parse_number(value)
    if count is None or not 1 <= count < inf:
        name = columns.names_of("examples")
        raise BrokenRecord(f"has {quoted(value)} under {name}, which is not a count")
    return 1 / count


def _opinions(row: RawRecord, columns: Columns, count: int) -> list[list[float]]:
    """Return the annotators' rankings: lists, or mappings that contain the ranking."""
    given = list_of_cells(columns.find("opinions", row.values) or [])
    if given is None:
        raise BrokenRecord(f"has no list of rankings under {columns.names_of('opinions')}")
    rankings = [columns.find("ranking", one) if isinstance(one, dict) else one for one in given]
    return [parse_numbers(ranks or [], count, columns.names_of("opinions")) for ranks in rankings]


def _sides(
    row: RawRecord, columns: Columns, roles: Sequence[str], folder: Path
) -> list[ImageSource]:
    pictures = []
    for role in roles:
        cell = columns.find(role, row.values)
        if cell is None:
            raise BrokenRecord(f"has no image under {columns.names_of(role)}; {row.names()}")
        pictures.append(image_source(cell, f"{row.where}, {role} image", folder))
    return pictures


def _win(ahead: float) -> float:
    return 0.5 if ahead == 0 else float(ahead > 0)
