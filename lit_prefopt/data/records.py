"""Reading a file of preferences, whatever its keys are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from lit_prefopt.errors import InputError


class Columns(NamedTuple):
    """The names under which a record holds what we look for."""

    prompt: str
    chosen: str
    rejected: str
    images: str
    ranking: str
    scores: str


class Ranked(NamedTuple):
    """One image of a record and its place among the others."""

    path: Path
    worth: float  # higher is better
    facts: dict[str, float]  # rank and score, as far as they are known


def read_records(source: Path) -> Iterator[tuple[str, Any]]:
    """Yield every record and where it stands."""
    try:
        with source.open(encoding="utf-8") as file:
            if source.suffix == ".json":
                content = _parse(str(source), file.read())
                records = content if isinstance(content, list) else [content]
                yield from ((f"{source}, record {n}", row) for n, row in enumerate(records, 1))
                return
            for n, line in enumerate(file, 1):  # one line at a time: the file may be of any size
                if line.strip():
                    where = f"{source}, line {n}"
                    yield where, _parse(where, line)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error}); check the path.") from error


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({error}); repair it.") from error


def read_ranked(
    where: str, record: Any, columns: Columns, folder: Path
) -> tuple[str, list[Ranked]]:
    """Return the text and the images of a record, the better one of a pair first."""
    keys = set(record) if isinstance(record, dict) else set()
    if columns.prompt not in keys or not isinstance(record[columns.prompt], str):
        raise InputError(f"{where} has no text under {columns.prompt!r}; name its key as `prompt`.")
    if columns.images in keys:
        return record[columns.prompt], _ranked(where, record, columns, folder)
    sides = (columns.chosen, columns.rejected)
    if not keys.issuperset(sides) or not all(isinstance(record[side], str) for side in sides):
        raise InputError(
            f"{where} has neither {columns.images!r} nor {sides[0]!r} and {sides[1]!r}; name the "
            "keys of its paths as `images`, or as `chosen` and `rejected`."
        )
    best, worst = (folder / record[side] for side in sides)
    return record[columns.prompt], [Ranked(best, 1.0, {}), Ranked(worst, 0.0, {})]


def _ranked(where: str, record: Mapping[str, Any], columns: Columns, folder: Path) -> list[Ranked]:
    paths = record[columns.images]
    known = {
        name: record[key]
        for name, key in (("rank", columns.ranking), ("score", columns.scores))
        if key in record
    }
    if not known:
        raise InputError(
            f"{where} has neither {columns.ranking!r} nor {columns.scores!r}; name the key of its "
            "ranks as `ranking` or of its scores as `scores`."
        )
    if not _texts(paths) or not all(_numbers(v, len(paths)) for v in known.values()):
        raise InputError(
            f"{where} has not one number for each path of {columns.images!r}; repair it or leave "
            "it out."
        )
    rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
    worths = [-row["rank"] if "rank" in row else row["score"] for row in rows]
    return [
        Ranked(folder / path, worth, row)
        for path, worth, row in zip(paths, worths, rows, strict=True)
    ]


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and isfinite(value) for value in values)
    )
