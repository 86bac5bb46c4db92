"""Files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, and give it its name at the end."""
    with atomic_file(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that gets its name when the block ends well.

    Its bytes are on the disk before it has its name, so that neither a kill nor a power cut leaves
    half a file under it; what an error leaves is removed.

    Args:
        path: The file to be made; one that exists is replaced in one go.
    """
    path = Path(path)
    file, temporary = tempfile.mkstemp(prefix=temporary_prefix(path), dir=path.parent)
    try:
        with os.fdopen(file, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _settle(path.parent)


@contextmanager
def atomic_output(path: Path, replace: bool = False) -> Iterator[Path]:
    """Lend a temporary path for a file or folder, which gets its name when the block ends well.

    Args:
        path: The name that it gets.
        replace: Whether something may go by it already, which then gives way at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a sibling, hence on the same file system: the rename at the end is atomic
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(path), dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        files = [temporary] if temporary.is_file() else temporary.rglob("*")
        for file in files:
            if file.is_file():
                file.chmod(0o644)  # safetensors' files are for their owner alone
        if replace and path.exists():
            os.rename(path, Path(folder) / "before")
        os.rename(temporary, path)


def temporary_prefix(path: Path) -> str:
    """Return how the names of a file's temporaries begin."""
    return f".{path.name}."


def remove_temporaries(folder: Path, pattern: str) -> None:
    """Remove what a killed process left of files whose names match `pattern`."""
    for left in folder.glob(temporary_prefix(Path(pattern)) + "*"):
        left.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Let the new name reach the disk too, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
