"""Disk store of tensors by key: written atomically, checked when read, bounded in size."""

from __future__ import annotations

import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_prefopt.utils.atomic_files import PARTIAL

log = logging.getLogger(__name__)

MAGIC = b"lit-prefopt record 1"
HEAD = len(MAGIC) + 4  # with the checksum
ABANDONED = 3600.0  # seconds after which a partial file belongs to a killed process


class RecordStore:
    """A folder of records: tensors by kind and key, shared by all processes of a machine.

    A record is written beside its final name and renamed, so that readers and other writers see
    the whole of it or nothing. It starts with a checksum: one that is damaged later is removed with
    a warning, and its key is free again. The rest is safetensors, so that nothing is unpickled.

    Args:
        folder: Folder of the records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        """Return the path of a record."""
        return self.folder / kind / key[:2] / key

    def __contains__(self, name: tuple[str, str]) -> bool:
        """Return whether there is a record of this kind and key."""
        return self.path(*name).exists()

    def read(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a record; None if there is none, or it was damaged.

        Args:
            kind: Kind of the record.
            key: Its key in this kind.
        """
        path = self.path(kind, key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s) and is made again.", path, error)
            return None
        body = memoryview(data)[HEAD:]
        if data[:HEAD] == _head(body):
            try:
                return load(bytes(body))
            except SafetensorError as error:  # written by another version
                log.debug("%s is no safetensors file.", path, exc_info=error)
        log.warning("%s was damaged and is made again.", path)
        with suppress(OSError):
            path.unlink()
        return None

    def write(self, kind: str, key: str, tensors: dict[str, Tensor]) -> int:
        """Write a record and return its size in bytes.

        It is not synced to the disk: what a power cut damages is found by the checksum.

        Args:
            kind: Kind of the record.
            key: Its key in this kind.
            tensors: Tensors on the CPU by name.

        Raises:
            OSError: It cannot be written.
        """
        path = self.path(kind, key)
        body = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{key}.{os.getpid()}{PARTIAL}")
        try:
            with temporary.open("wb") as stream:
                stream.write(_head(memoryview(body)))
                stream.write(body)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        return HEAD + len(body)

    def keys(self, kind: str) -> Iterator[str]:
        """Yield the keys of all records of a kind."""
        for path in (self.folder / kind).glob("??/*"):
            if not path.name.startswith("."):
                yield path.name


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, and remove what killed processes left there.

    Args:
        folder: The folder, which may change meanwhile.
    """
    total, now = 0, time.time()
    for path, status in _files(folder):
        if path.name.endswith(PARTIAL) and now - status.st_mtime > ABANDONED:
            with suppress(OSError):
                path.unlink()
            continue
        total += status.st_size
    return total


def remove_oldest(folders: list[Path], excess: int) -> int:
    """Remove folders, the least recently changed first, until so many bytes are free.

    Args:
        folders: The folders.
        excess: Bytes to remove; all folders if they have fewer.

    Returns:
        The bytes that were removed.
    """
    removed = 0
    for folder in sorted(folders, key=_changed):
        if removed >= excess:
            break
        removed += size_of(folder)
        shutil.rmtree(folder, ignore_errors=True)  # another process may remove it too
    return removed


def _head(body: memoryview) -> bytes:
    return MAGIC + zlib.crc32(body).to_bytes(4, "little")


def _changed(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            with suppress(OSError):  # removed meanwhile
                yield path, path.stat()
