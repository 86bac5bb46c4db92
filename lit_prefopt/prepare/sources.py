"""Find the files of a source, detect their format and open them."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Literal

from lit_prefopt.data.shards.find import MOST, expand_braces
from lit_prefopt.errors import InputError, quoted
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.folders import is_pair_folder, pair_folder
from lit_prefopt.prepare.image_rows import group_images
from lit_prefopt.prepare.parquet import parquet
from lit_prefopt.prepare.separated import separated
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource, listed
from lit_prefopt.prepare.splits import training_files
from lit_prefopt.prepare.tables import json_file, json_lines
from lit_prefopt.prepare.tars import tar_samples
from lit_prefopt.utils.filesystem import check_regular

Format = Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "tar", "folder"]
SUFFIXES = {
    **{".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"},
    **{".parquet": "parquet", ".tar": "tar"},
}
Reader = Callable[[Path], Iterator[RawRecord]]
READERS: dict[str, Reader] = {
    "json": json_file,
    "jsonl": json_lines,
    "csv": partial(separated, delimiter=","),
    "tsv": partial(separated, delimiter="\t"),
}


def open_source(
    source: str,
    form: Format,
    columns: Columns,
    only: Set[str] | None = None,
    *,
    grouped: bool = True,
) -> RecordSource:
    """Return the records of a source.

    Args:
        source: A file, a folder, or a pattern of files with * or {000..099}.
        form: Its format; auto detects it from the file extensions.
        columns: Column names of the source.
        only: Names of the columns that are needed, if not all of them are.
        grouped: Whether records with one image are grouped to lists by prompt.
    """
    try:
        opened = _open(source, form, columns, columns.all() if only is None else only)
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"{quoted(source)} cannot be read ({error.strerror}); check the path."
        ) from error
    rows = group_images(opened.rows, columns) if grouped else opened.rows
    return opened._replace(rows=_guarded(source, rows))


def _open(source: str, form: Format, columns: Columns, only: Set[str]) -> RecordSource:
    if is_pair_folder(Path(source)) and form in ("auto", "folder"):
        return pair_folder(Path(source))
    if form == "folder":
        raise InputError(f"{source} has no folders chosen/ and rejected/; name their parent.")
    paths, notes = _files(source, form)
    kind = SUFFIXES.get(paths[0].suffix.lower(), "") if form == "auto" else form
    if not kind:
        raise InputError(
            f"{source} has no known file extension; name its format, for example --format jsonl."
        )
    if kind == "parquet":
        return parquet(paths, only)._replace(notes=notes)
    names = columns.all()
    readers: dict[str, Reader] = {
        **READERS,
        "csv": partial(separated, delimiter=",", names=names),
        "tsv": partial(separated, delimiter="\t", names=names),
        "tar": partial(tar_samples, columns=columns, only=only),
    }
    return RecordSource(_each(paths, readers[kind]), notes=notes)


def _each(paths: list[Path], reader: Reader) -> Iterator[RawRecord]:
    """Yield the rows of all files; one that cannot be read does not stop the others."""
    for path in paths:
        try:
            yield from reader(path)
        except InputError as error:
            if len(paths) == 1:
                raise
            reason = str(error).removeprefix(f"{path} ").rstrip(".")
            yield RawRecord(str(path), {}, path.parent, reason)
        except UnicodeError as error:  # of UTF-16 and UTF-32; others become surrogates
            reason = f"cannot be read further ({error}); save it as UTF-8"
            yield RawRecord(str(path), {}, path.parent, reason)


def _guarded(source: str, rows: Iterator[RawRecord]) -> Iterator[RawRecord]:
    try:
        yield from rows
    except OSError as error:
        raise InputError(
            f"{source} cannot be read further ({error.strerror}); check the disk."
        ) from error


def _files(source: str, form: str) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files of a source, sorted by name, and a note on those that are not read."""
    folder = Path(source)
    if not os.path.isdir(folder):  # unlike Path's method, it refuses no name
        return _matching(source)
    wanted = [form] if form != "auto" else ["parquet", "tar"]
    for kind in wanted:
        endings = [suffix for suffix, name in SUFFIXES.items() if name == kind]
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and p.is_file())
        if files:
            return training_files(source, files)
    raise InputError(
        f"{source} contains neither chosen/ and rejected/ nor {' nor '.join(wanted)} files, but "
        f"{_contents(folder)}; name the folder that contains them, or the file itself."
    )


def _contents(folder: Path) -> str:
    """Return what a folder contains, for messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return listed(names) or "nothing"


def _matching(source: str) -> tuple[list[Path], tuple[str, ...]]:
    check_regular(source)
    if os.path.exists(source):  # also if its name looks like a pattern
        return [Path(source)], ()
    try:
        names = (expand_braces(source) or [source])[:MOST]
    except ValueError:  # unbalanced braces are part of a name
        names = [source]
    paths, notes = list[Path](), list[str]()
    for name in names:
        found = [Path(name)]
        if set(name) & set("*?["):
            found = [Path(path) for path in sorted(glob.glob(name)) if Path(path).is_file()]
            found, note = training_files(name, found)
            notes += note
        if not found or not os.path.isfile(found[0]):
            raise InputError(f"{name} cannot be read (no such file); check the path.")
        paths += found
    return paths, tuple(notes)
