"""Read prompts from text files, tables, JSON or pair shards."""

from __future__ import annotations

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.format import INDEX
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError, quoted, shortened
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.sources import READERS, SUFFIXES
from lit_prefopt.prepare.tables import CHUNK, json_values
from lit_prefopt.prompts.base import PromptEntry
from lit_prefopt.utils.addresses import check_address
from lit_prefopt.utils.filesystem import check_regular, filesystem, is_local, read_whole

LINES, SHARDS = "txt", "shards"
FORMATS = (LINES, *READERS)
ENDINGS = (".tar", INDEX)  # files in a folder of shards
LONGEST = 1_000_000  # characters of a line of a .txt file
TABLES = ("csv", "tsv")  # their records have no key for an empty cell
USUAL = (*Columns().prompt, "prompts")
"""Default names of the prompt column, case-insensitive."""

KINDS = ("category", "tag", "style")
"""Default names of the category column; the first that exists is used."""


def read_prompts(source: str, column: str | None = None, count: int | None = None) -> list[str]:
    """Read the prompts of a source in order; empty ones are skipped.

    Args:
        source: A .txt, .json, .jsonl, .csv or .tsv file in UTF-8, local or remote, or what
            `find_shards` takes. A URL without a file extension gets one: `…?id=7#a.csv`.
        column: The key or column of the prompts; by default the usual name that exists.
        count: Number of prompts, from the first one on; by default all.
    """
    return [entry.text for entry in read_entries(source, column, count)]


def read_entries(
    source: str, column: str | None = None, count: int | None = None, category: str | None = None
) -> list[PromptEntry]:
    """Read the prompts of a source with their categories, in order.

    Args:
        source: As `read_prompts` takes it.
        column: The key or column of the prompts.
        count: Number of prompts, from the first one on.
        category: The key or column of the categories; by default the first of the usual names
            that exists, if any.
    """
    check_address(source)
    kind = _kind(source)
    if kind in (LINES, SHARDS) and (column, category) != (None, None):
        name = "column" if column is not None else "category"
        raise InputError(f"{source} has no columns: omit `{name}`.")
    if kind == SHARDS:
        found = [PromptEntry(text) for text in islice(_of_shards(source), count)]
    else:
        with _at_hand(source) as path:
            _check_encoding(path)
            every = _lines(path) if kind == LINES else _of_records(path, kind, column, category)
            found = list(islice((entry for entry in every if entry.text), count))
    if not found:
        raise InputError(f"{source} contains no prompt; name a file or shards with prompts.")
    return found


def _kind(source: str) -> str:
    address = urlsplit(source)
    name = (address.fragment or address.path) if "://" in source else source
    ending = PurePosixPath(name).suffix.lower()
    if os.path.isdir(source):
        return SHARDS
    kind = SUFFIXES.get(ending, ending.removeprefix("."))
    if kind in FORMATS:
        return kind
    if kind != "tar" and os.path.isfile(source):
        raise InputError(
            f"{source} has an unknown file extension; give a .txt, .json, .jsonl, .csv or .tsv "
            "file, or a folder of pair shards."
        )
    return SHARDS


def _of_shards(source: str) -> Iterator[str]:
    if os.path.isdir(source) and not any(name.endswith(ENDINGS) for name in os.listdir(source)):
        raise InputError(
            f"{source} is a folder without pair shards; give a file of prompts, such as "
            "prompts.txt, or the folder of an index.json."
        )
    reader = ShardReader(find_shards(source))
    for shard, samples in enumerate(reader.counts):
        for sample in range(samples):
            try:
                text = reader.text(shard, sample).strip()
            except BrokenSample as error:
                raise InputError(
                    f"{error}; `lit-prefopt shards validate --shards {source}` lists all "
                    "broken samples."
                ) from error
            if text:
                yield text


def _lines(path: Path) -> Iterator[PromptEntry]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise InputError(
                    f"{path}, line {number}, has more than {LONGEST} characters; write one prompt "
                    "per line."
                )
            yield PromptEntry(line.lstrip("\ufeff").strip())  # of a file that was appended


def _of_records(
    path: Path, kind: str, column: str | None, category: str | None
) -> Iterator[PromptEntry]:
    names: dict[str, None] = {}  # of all columns, in order of first occurrence
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
            f"{path} has no {quoted(category)}, but {_listed(names)}: set `category` to the one "
            "with the categories, or omit it."
        )


def _category(where: str, record: Mapping[str, Any], column: str | None) -> str | None:
    """Return a prompt's category, or None."""
    known = {name.lower(): name for name in record} if column is None else {column: column}
    name = next((known[kind] for kind in (column, *KINDS) if kind in known), None)
    value = record.get(name) if name is not None else None
    return _text(where, value, name).strip() or None if isinstance(value, str) else None


def _without(where: str, names: Mapping[str, Any], column: str | None) -> InputError:
    wanted = " or ".join(map(quoted, USUAL if column is None else [column]))
    return InputError(
        f"{where} has no {wanted}, but {_listed(names)}: set `column` to the one with the prompts."
    )


def _text(where: str, value: Any, name: str | None) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} has no text under {quoted(name)}; set another `column`.")
    text = value or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        raise InputError(f"{where} has a text that is not UTF-8; fix the file.") from error
    return text


def _records(path: Path, kind: str, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mapping with each prompt, and its location for messages."""
    if kind != "json":
        for row in READERS[kind](path):
            if row.reason:
                raise InputError(f"{row.where} {row.reason}; fix the file.")
            yield row.where, row.values
        return
    try:
        for number, value in enumerate(json_values(path), 1):
            yield from _unfolded(f"{path}, record {number}", value, column)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} {error}; fix the file.") from error


def _unfolded(where: str, value: Any, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a JSON value; some files map each prompt, or an id, to its metadata."""
    if isinstance(value, str):
        if column is not None:
            raise InputError(f"{where} is a text and has no {quoted(column)}; omit `column`.")
        yield where, {USUAL[0]: value}
        return
    if not isinstance(value, dict):
        raise InputError(f"{where} is neither a text nor a mapping; fix the file.")
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
        inside = f"{where}, {quoted(name)}"
        if column is not None:
            yield inside, record
            continue
        usual = _usual(inside, record)
        if usual is not None:
            raise InputError(
                f"{inside} may be a prompt itself or contain one under {quoted(usual)}: set "
                f"`column: {usual}` for the latter, or convert the mapping to a list."
            )
        yield inside, {**record, USUAL[0]: name}


def _holds_lists(value: Mapping[str, Any]) -> bool:
    """Return whether a mapping has lists of prompts by category."""
    return bool(value) and all(isinstance(texts, list) for texts in value.values())


def _usual(where: str, record: Mapping[str, Any]) -> str | None:
    """Return the usual prompt column that a record has, or None."""
    names = [name for name in record if name.lower() in USUAL]
    if len(names) > 1:
        raise InputError(f"{where} has {_listed(names)}: set `column` to one of them.")
    return names[0] if names else None


def _listed(names: Any) -> str:
    return shortened(", ".join(map(quoted, names)), 300)


def _check_encoding(path: Path) -> None:
    check_regular(path)
    try:
        with path.open("rb") as file:
            wrong = _wrong_line(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if wrong is not None:
        raise InputError(f"{path}, line {wrong}, is not UTF-8; save the file as UTF-8.")


def _wrong_line(file: BinaryIO) -> int | None:
    """Return the number of the first line that is not UTF-8, or None."""
    decoder, line, piece = getincrementaldecoder("utf-8")(), 1, b"."
    while piece:  # in pieces, because a line may be as long as the file
        piece = file.read(CHUNK)
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            return line + error.object[: error.start].count(b"\n")
        if "\0" in text:  # UTF-16 text of ASCII letters is full of NUL bytes
            return line + text[: text.index("\0")].count("\n")
        line += text.count("\n")
    return None


@contextmanager
def _at_hand(source: str) -> Iterator[Path]:
    """Yield the local path of a file; a remote one is downloaded to a temporary folder."""
    fs, path = filesystem(source)
    if is_local(fs):
        yield Path(path) if "://" in source else Path(source)
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "prompts"
        try:
            copy.write_bytes(read_whole(source))
        except FileNotFoundError as error:
            raise InputError(f"There is no {source}; check the address.") from error
        try:
            yield copy
        except InputError as error:  # name the address, not the temporary file
            raise InputError(str(error).replace(str(copy), source)) from error
