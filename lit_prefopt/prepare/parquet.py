"""Read parquet files, the format of most datasets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from lit_prefopt.errors import InputError
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource

BATCH = 16  # rows in memory at a time: each may hold two images of some megabytes


def parquet(paths: list[Path], names: Set[str]) -> RecordSource:
    """Return the records of parquet files; read only the columns with these names."""
    total = 0
    for path in paths:  # check all before reading any; a dataset may have hundreds
        with _open(path) as file:
            total += file.metadata.num_rows
            columns = file.schema_arrow.names
        if not names & set(columns):
            raise InputError(
                f"{path} has the columns {', '.join(columns)} and none of the expected ones; name "
                "them, for example `--columns.prompt caption`."
            )
    return RecordSource((row for path in paths for row in _rows(path, names)), total)


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"{path} cannot be read without pyarrow; install it with "
            "`pip install lit-prefopt[parquet]`."
        ) from error
    try:
        # read by page: a page has up to about a thousand rows, a row group of images is gigabytes
        return ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (ArrowException, OSError, ValueError) as error:  # ValueError for column names
        raise InputError(
            f"{path} cannot be read as parquet ({_line(error)}); copy it again."
        ) from error


def _rows(path: Path, names: Set[str]) -> Iterator[RawRecord]:
    from pyarrow import ArrowException

    number = 0
    with _open(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in names]
        try:
            for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield _row(f"{path}, row {number}", batch, index, path)
        except (ArrowException, OSError) as error:
            # skip the rest of this file and continue with the next one
            reason = f"cannot be read ({_line(error)})"
            yield RawRecord(f"{path}, row {number + 1}", {}, path.parent, reason)


def _row(where: str, batch: Any, index: int, path: Path) -> RawRecord:
    try:
        values = {name: batch[name][index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return RawRecord(where, {}, path.parent, "has a text that is not UTF-8")
    return RawRecord(where, values, path.parent)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
