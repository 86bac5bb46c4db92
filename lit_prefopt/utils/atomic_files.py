"""Write files atomically: complete or absent."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lit_prefopt.errors import InputError
from lit_prefopt.utils.os_errors import name_output

PARTIAL = ".partial"  # extension of temporary files and folders
RANDOM = "?" * 8  # characters of their names that `tempfile` draws


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically, by a temporary file beside it and a rename."""
    with atomic_file(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, renamed when the block ends without an error.

    It is synced to the disk before the rename, so that neither a kill nor a power cut leaves a
    partial file; after an error it is removed.

    Args:
        path: The output file; an existing one is replaced atomically.
    """
    path = Path(path)
    _check_replaceable(path)
    with name_output(path, path.parent):
        file, temporary = tempfile.mkstemp(PARTIAL, temporary_prefix(path), path.parent)
    try:
        with name_output(path, Path(temporary)):
            with os.fdopen(file, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp sets 0o600
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _settle(path.parent)


@contextmanager
def atomic_output(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path of a file or folder, renamed when the block ends without an error.

    Args:
        path: The final path.
        replace: Whether to replace an existing file or folder at the end.
    """
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a sibling, hence on the same file system: the rename at the end is atomic
    with temporary_folder(path) as folder, name_output(path, folder):
        temporary = folder / path.name
        yield temporary
        files = [temporary] if temporary.is_file() else temporary.rglob("*")
        for file in files:
            if file.is_file():
                file.chmod(0o644)  # safetensors sets 0o600
        if replace and path.exists():
            os.rename(path, folder / "before")
        os.rename(temporary, path)


def _check_replaceable(path: Path) -> None:
    """Check that no pipe or device has the path, which a rename would replace."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path} is a pipe or a device; choose the path of a file or a folder.")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside an output, and remove it when the block ends.

    Args:
        path: The output; the block may rename the folder to it.
    """
    with name_output(path, path.parent):
        folder = Path(tempfile.mkdtemp(PARTIAL, temporary_prefix(path), path.parent))
    try:
        folder.chmod(0o755)  # mkdtemp sets 0o700
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_prefix(path: Path) -> str:
    """Return the prefix of a file's temporary files."""
    return f".{path.name}."


def remove_partial(folder: Path, name: str) -> None:
    """Remove temporary files and folders that killed processes left beside an output.

    Args:
        folder: The folder of the outputs.
        name: Name of the output, which must be locked; `*` for all that have no lock of their own.
    """
    for left in folder.glob(f".{name if name == '*' else glob.escape(name)}.{RANDOM}{PARTIAL}"):
        output = left.name.removesuffix(PARTIAL)[1 : -len(RANDOM) - 1]
        if name == "*" and (folder / lock_name(output)).exists():
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def lock_name(name: str) -> str:
    """Return the name of the lock file beside an output."""
    return f".{name}-lock"


def remove_temporaries(folder: Path, pattern: str) -> None:
    """Remove a killed process's temporary files of names that match `pattern`."""
    for left in folder.glob(temporary_prefix(Path(pattern)) + "*"):
        left.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Sync a folder's entries to the disk, if folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
