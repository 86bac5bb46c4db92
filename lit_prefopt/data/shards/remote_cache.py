"""Disk cache of remote shards: shared by all processes of a machine, with bounded size.

fsspec's own caches have no size limit, no lock between processes and no check of file sizes, and
they write to the final name; so this is a thin layer over `fsspec.get_file`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2s
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lit_prefopt.data.shards.format import Shard
from lit_prefopt.errors import InputError
from lit_prefopt.utils.filesystem import TransferLimit, filesystem, is_local, retry

POLL = 0.1  # seconds between two checks for space
LOCK = "cache.lock"  # held while the cache is measured or changed


class ShardCache:
    """A folder of fetched shards, with eviction of the least recently opened ones.

    Args:
        folder: Cache folder; by default `lit-prefopt` in $XDG_CACHE_HOME or ~/.cache.
        limit: Maximum size in bytes, including running downloads.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = 64_000_000_000) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.limit = limit

    def check(self, shards: Sequence[Shard], shards_per_block: int) -> None:
        """Check that the limit does not cause repeated downloads of the same shards.

        Args:
            shards: The shards of a run.
            shards_per_block: Number of shards read at a time.
        """
        folders = {shard.folder for shard in shards}
        remote = {folder for folder in folders if not is_local(filesystem(folder)[0])}
        if not remote:
            return
        self._make_folder()
        sizes = sorted((s.size for s in shards if s.folder in remote), reverse=True)
        # at the boundary of two blocks, processes read from both
        needed = sum(sizes[: 2 * shards_per_block])
        if needed > self.limit:
            raise InputError(
                f"The shards of two blocks have {needed} bytes, more than the {self.limit} of the "
                "cache; raise `cache_size`, or lower `shards_per_block`."
            )

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading, and fetch it first if needed.

        An open shard stays readable after its eviction, until the file is closed.
        """
        path = self.folder / f"{_key(shard)}.tar"
        file = _opened(path, shard.size)
        if file is not None:
            return file
        self._make_folder()
        with FileLock(self._lock(path)):
            # another process may have fetched it meanwhile
            return _opened(path, shard.size) or self._fetch(shard, path)

    def _fetch(self, shard: Shard, path: Path) -> BinaryIO:
        part = path.with_suffix(f".{shard.size}.part")
        self._reserve(part, shard)
        try:
            retry(shard.url, lambda: _download(shard, part))
            file = part.open("rb")  # before others can see and evict it
            with FileLock(self.folder / LOCK):  # or a concurrent measurement may count it twice
                os.replace(part, path)
        except FileNotFoundError as error:
            raise InputError(
                f"{shard.url} is missing; copy it there, or make the index again with "
                f"`lit-prefopt shards index --folder {shard.folder}`."
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return file

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be created ({error}); choose another folder with `cache`."
            ) from error

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Reserve space for a shard; the name of its partial file contains its size."""
        if shard.size > self.limit:
            raise InputError(
                f"{shard.url} has {shard.size} bytes, more than the {self.limit} of the cache; "
                "raise `cache_size`."
            )
        while True:
            with FileLock(self.folder / LOCK):
                if self._evict(self.limit - shard.size):
                    part.touch()
                    return
            time.sleep(POLL)  # wait for other downloads, which can be evicted when finished

    def _evict(self, most: int) -> bool:
        """Evict the least recently opened shards until the cache is within a size.

        Returns:
            False if running downloads alone exceed it.
        """
        taken = sum(self._reserved())
        if taken > most:
            return False
        for path, status in sorted(_files(self.folder), key=lambda file: -file[1].st_mtime_ns):
            if taken + status.st_size > most:
                path.unlink(missing_ok=True)
            else:
                taken += status.st_size
        return True

    def _reserved(self) -> Iterator[int]:
        for part in self.folder.glob("*.part"):
            key, size, _ = part.name.split(".")
            try:
                with FileLock(self._lock(self.folder / key), timeout=0):
                    part.unlink(missing_ok=True)  # of a killed process
            except Timeout:  # being downloaded
                yield int(size)

    def _lock(self, path: Path) -> Path:
        return path.with_suffix(".lock")


def default_folder() -> Path:
    """Return the default cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lit-prefopt"


class _WrongSizeError(Exception):
    """The size differs from the index; retried, because the transfer may have been cut short."""

    cost = 3  # attempts: each may be a whole transfer

    def __init__(self, size: Any, shard: Shard) -> None:
        super().__init__(
            f"it has {size} bytes instead of {shard.size}: it was cut short, or the shard "
            f"has changed and needs `lit-prefopt shards index --folder {shard.folder}`"
        )


class _SizeLimit(TransferLimit):
    """Stops a transfer that is too slow, or whose size differs from the expected one."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.url, math.inf)  # the exact size is checked below
        self.shard = shard

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes; the response was successful, so its size is that of the shard."""
        super().relative_update(inc)
        if self.size not in (None, self.shard.size) or self.value > self.shard.size:
            raise _WrongSizeError(self.size or self.value, self.shard)


def _download(shard: Shard, part: Path) -> None:
    fs, path = filesystem(shard.url)
    fs.get_file(path, str(part), callback=_SizeLimit(shard))
    size = part.stat().st_size
    if size != shard.size:
        raise _WrongSizeError(size, shard)


def _key(shard: Shard) -> str:
    """Return a cache key that depends on the index, so that stale content is never used."""
    name = f"{shard.url}\0{shard.size}\0".encode()
    return blake2s(name + shard.offsets.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _opened(path: Path, size: int) -> BinaryIO | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == size:
        with suppress(PermissionError):  # owned by another user of a shared folder
            os.utime(file.fileno())  # opened last, removed last
        return file
    file.close()
    return None


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        try:
            yield path, path.stat()
        except FileNotFoundError:  # evicted by another process
            continue
