"""Prompts alone, out of whatever holds them: a text, a table, JSON, or pair shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.sources import READERS, SUFFIXES
from lit_prefopt.prepare.tables import json_values
from lit_prefopt.prompts.base import PromptEntry
from lit_prefopt.utils.filesystem import filesystem, is_local, retry

LINES, SHARDS = "txt", "shards"
FORMATS = (LINES, *READERS)
TABLES = ("csv", "tsv")  # whose records have no key for an empty cell
USUAL = (*Columns().prompt, "prompts")
"""Names under which prompts are looked for where none is given, in capitals or not."""

KINDS = ("category", "tag", "style")
"""Names under which their categories are looked for; the first one that is there counts."""


def read_prompts(source: str, column: str | None = None, count: int | None = None) -> list[str]:
    """Return the prompts of a source in their order; empty ones are left out.

    Args:
        source: A .txt, .json, .jsonl, .csv or .tsv file in UTF-8, local or remote, or what
            `find_shards` takes. A URL that ends otherwise says it at its end: `…?id=7#a.csv`.
        column: The key or column that holds them; where not given, the usual name that is there.
        count: How many of the first ones to return; all where not given.
    """
    return [entry.text for entry in read_entries(source, column, count)]


def read_entries(
    source: str, column: str | None = None, count: int | None = None, category: str | None = None
) -> list[PromptEntry]:
    """Return the prompts of a source with their categories, in their order.

    Args:
        source: As `read_prompts` takes it.
        column: The key or column that holds the prompts.
        count: How many of the first ones to return.
        category: The key or column that holds the categories; where not given, the first of the
            usual names that is there, if one is.
    """
    kind = _kind(source)
    if kind in (LINES, SHARDS) and (column, category) != (None, None):
        name = "column" if column is not None else "category"
        raise InputError(f"{source} has no columns: leave `{name}` out.")
    if kind == SHARDS:
        found = [PromptEntry(text) for text in islice(_of_shards(source), count)]
    else:
        with _at_hand(source) as path:
            _check_encoding(path)
            every = _lines(path) if kind == LINES else _of_records(path, kind, column, category)
            found = list(islice((entry for entry in every if entry.text), count))
    if not found:
        raise InputError(f"{source} holds no prompt; name a file or shards with some.")
    return found


def _kind(source: str) -> str:
    address = urlsplit(source)
    name = (address.fragment or address.path) if "://" in source else source
    ending = PurePosixPath(name).suffix.lower()
    if Path(source).is_dir():
        return SHARDS
    kind = SUFFIXES.get(ending, ending.removeprefix("."))
    if kind in FORMATS:
        return kind
    if kind != "tar" and Path(source).is_file():
        raise InputError(
            f"{source} has an ending that tells no format of prompts; give a file that ends in "
            ".txt, .json, .jsonl, .csv or .tsv, or a folder of pair shards."
        )
    return SHARDS


def _of_shards(source: str) -> Iterator[str]:
    reader = ShardReader(find_shards(source))
    for shard, samples in enumerate(reader.counts):
        for sample in range(samples):
            try:
                text = reader.text(shard, sample).strip()
            except BrokenSample as error:
                raise InputError(
                    f"{error}; `lit-prefopt shards validate --shards {source}` names all that is "
                    "broken."
                ) from error
            if text:
                yield text


def _lines(path: Path) -> Iterator[PromptEntry]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield PromptEntry(line.strip())


def _of_records(
    path: Path, kind: str, column: str | None, category: str | None
) -> Iterator[PromptEntry]:
    names: dict[str, None] = {}  # of all columns, in the order in which they came
    found = False
    for where, record in _records(path, kind, column):
        name = column or _usual(where, record)
        if name in record:
            found = True
            text = _text(where, record[name], name).strip()
            yield PromptEntry(text, _category(where, record, category))
        elif kind not in TABLES:
            raise _without(where, record, column)
        names |= dict.fromkeys(record)
    if names and not found:
        raise _without(str(path), names, column)
    if found and category is not None and category not in names:
        raise InputError(
            f"{path} has no {category!r}, but {_listed(names)}: name the one with the categories "
            "as `category`, or leave it out."
        )


def _category(where: str, record: Mapping[str, Any], column: str | None) -> str | None:
    """Return a prompt's category, if it has one."""
    known = {name.lower(): name for name in record} if column is None else {column: column}
    name = next((known[kind] for kind in (column, *KINDS) if kind in known), None)
    value = record.get(name) if name is not None else None
    return _text(where, value, name).strip() or None if isinstance(value, str) else None


def _without(where: str, names: Mapping[str, Any], column: str | None) -> InputError:
    wanted = " or ".join(map(repr, USUAL if column is None else [column]))
    return InputError(
        f"{where} has no {wanted}, but {_listed(names)}: name the one with the prompts as `column`."
    )


def _text(where: str, value: Any, name: str | None) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} holds no text under {name!r}; name another `column`.")
    text = value or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a letter
        raise InputError(f"{where} has a text that is not UTF-8; mend the file.") from error
    return text


def _records(path: Path, kind: str, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mapping that holds each prompt, and where it stands."""
    if kind != "json":
        for row in READERS[kind](path):
            if row.reason:
                raise InputError(f"{row.where} {row.reason}; mend the file.")
            yield row.where, row.values
        return
    try:
        for number, value in enumerate(json_values(path), 1):
            yield from _unfolded(f"{path}, record {number}", value, column)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} {error}; mend the file.") from error


def _unfolded(where: str, value: Any, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a JSON value: some files map every prompt, or a name, to its facts."""
    if isinstance(value, str):
        if column is not None:
            raise InputError(f"{where} is a text and has no {column!r}; leave `column` out.")
        yield where, {USUAL[0]: value}
        return
    if not isinstance(value, dict):
        raise InputError(f"{where} is neither a text nor a mapping; mend the file.")
    if column is None and _usual(where, value) is None and _holds_lists(value):
        for style, texts in value.items():
            for text in texts:
                yield where, {USUAL[0]: text, KINDS[0]: style}
        return
    folded = all(isinstance(record, dict) for record in value.values())
    if not folded or (column is not None and column in value):
        yield where, value
        return
    for name, record in value.items():
        inside = f"{where}, {shorten(name, 40)!r}"
        if column is not None:
            yield inside, record
            continue
        usual = _usual(inside, record)
        if usual is not None:
            raise InputError(
                f"{inside} may be a prompt itself or hold one under {usual!r}: take the latter as "
                f"`column: {usual}`, or make a list of the former."
            )
        yield inside, {**record, USUAL[0]: name}


def _holds_lists(value: Mapping[str, Any]) -> bool:
    """Whether a mapping has prompts by category."""
    return bool(value) and all(isinstance(texts, list) for texts in value.values())


def _usual(where: str, record: Mapping[str, Any]) -> str | None:
    """Return the usual name that a record has, if it has one."""
    names = [name for name in record if name.lower() in USUAL]
    if len(names) > 1:
        raise InputError(f"{where} has {_listed(names)}: name the one to take as `column`.")
    return names[0] if names else None


def _listed(names: Any) -> str:
    return shorten(", ".join(map(repr, names)), 300)


def _check_encoding(path: Path) -> None:
    try:
        with path.open("rb") as file:
            wrong = next((n for n, line in enumerate(file, 1) if not _is_text(line)), None)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if wrong is not None:
        raise InputError(f"{path}, line {wrong}, is not UTF-8; save the file as UTF-8.")


def _is_text(line: bytes) -> bool:
    try:
        return "\0" not in line.decode()  # which UTF-16 of plain letters is full of
    except UnicodeDecodeError:
        return False


@contextmanager
def _at_hand(source: str) -> Iterator[Path]:
    """Give the path of a file, which lies in a temporary folder for as long if it is remote."""
    fs, path = filesystem(source)
    if is_local(fs):
        yield Path(path) if "://" in source else Path(source)
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "prompts"
        try:
            copy.write_bytes(retry(source, lambda: fs.cat_file(path)))
        except FileNotFoundError as error:
            raise InputError(f"There is no {source}; check the address.") from error
        try:
            yield copy
        except InputError as error:  # the user knows the address alone
            raise InputError(str(error).replace(str(copy), source)) from error
