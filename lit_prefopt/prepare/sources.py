"""Find the files of a source, detect their format and open them."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from lit_prefopt.errors import InputError
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.folders import is_pair_folder, pair_folder
from lit_prefopt.prepare.parquet import parquet
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource
from lit_prefopt.prepare.tables import json_file, json_lines, separated
from lit_prefopt.prepare.tars import tar_samples

Format = Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "tar", "folder"]
SUFFIXES = {
    **{".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"},
    **{".parquet": "parquet", ".tar": "tar"},
}
READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    "json": json_file,
    "jsonl": json_lines,
    "csv": partial(separated, delimiter=","),
    "tsv": partial(separated, delimiter="\t"),
}


def open_source(source: str, form: Format, columns: Columns) -> RecordSource:
    """Return the records of a source.

    Args:
        source: A file, a folder, or a pattern of files with * or {000..099}.
        form: Its format; auto detects it from the file extensions.
        columns: Column names of the source.
    """
    try:
        rows, total = _open(source, form, columns)
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"{source[:200]} cannot be read ({error.strerror}); check the path."
        ) from error
    return RecordSource(_guarded(source, rows), total)


def _open(source: str, form: Format, columns: Columns) -> RecordSource:
    if is_pair_folder(Path(source)) and form in ("auto", "folder"):
        return pair_folder(Path(source))
    if form == "folder":
        raise InputError(f"{source} has no folders chosen/ and rejected/; name their parent.")
    paths = _files(source, form)
    for path in paths:
        if not path.is_file():  # reading it might never end
            raise InputError(f"{path} is a pipe or a device; write its content to a file first.")
    kind = SUFFIXES.get(paths[0].suffix.lower(), "") if form == "auto" else form
    if not kind:
        raise InputError(
            f"{source} has no known file extension; name its format, for example --format jsonl."
        )
    if kind == "parquet":
        return parquet(paths, columns.all())
    reader = partial(tar_samples, names=columns.all()) if kind == "tar" else READERS[kind]
    return RecordSource(row for path in paths for row in reader(path))


def _guarded(source: str, rows: Iterator[RawRecord]) -> Iterator[RawRecord]:
    try:
        yield from rows
    except OSError as error:
        raise InputError(
            f"{source} cannot be read further ({error.strerror}); check the disk."
        ) from error


def _files(source: str, form: str) -> list[Path]:
    """Return the files of a source, sorted by name."""
    folder = Path(source)
    if not folder.is_dir():
        return _matching(source)
    wanted = [form] if form != "auto" else ["parquet", "tar"]
    for kind in wanted:
        endings = [suffix for suffix, name in SUFFIXES.items() if name == kind]
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and p.is_file())
        if files:
            return files
    raise InputError(
        f"{source} contains neither chosen/ and rejected/ nor {' nor '.join(wanted)} files; name "
        "the folder that contains them, or the file itself."
    )


def _matching(source: str) -> list[Path]:
    if Path(source).exists():  # also if its name looks like a pattern
        return [Path(source)]
    try:
        names = list(braceexpand(source))
    except ValueError:  # unbalanced braces are part of a name
        names = [source]
    paths = []
    for name in names:
        found = sorted(glob.glob(name)) if set(name) & set("*?[") else [name]
        paths += [Path(path) for path in found if Path(path).is_file()]
        if not found or not Path(found[0]).is_file():
            raise InputError(f"{name} cannot be read (no such file); check the path.")
    return paths
