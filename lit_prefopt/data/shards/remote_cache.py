"""Remote shards on the local disk: fetched once by all processes of a machine, in bounded space.

fsspec's own caches know no bound, no lock between processes and no size that a file should have,
and they write under the final name; so what is here is a thin layer over `fsspec.get_file`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2s
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from fsspec.callbacks import Callback

from lit_prefopt.data.shards.format import Shard
from lit_prefopt.errors import InputError
from lit_prefopt.utils.filesystem import filesystem, is_local, retry

POLL = 0.1  # seconds between two looks for room
ROOM = "room.lock"  # held while the cache is counted or changed


class ShardCache:
    """A folder of fetched shards; those that were opened longest ago make room for new ones.

    Args:
        folder: Where they are kept; none: `lit-prefopt` in $XDG_CACHE_HOME or ~/.cache.
        limit: Most bytes that they take, those on their way included.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = 64_000_000_000) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.limit = limit

    def check(self, shards: Sequence[Shard], shards_per_block: int) -> None:
        """Refuse a bound that would fetch the same shards again and again.

        Args:
            shards: The shards of a run.
            shards_per_block: How many of them are read at a time.
        """
        folders = {shard.folder for shard in shards}
        remote = {folder for folder in folders if not is_local(filesystem(folder)[0])}
        if not remote:
            return
        self._make_folder()
        sizes = sorted((s.size for s in shards if s.folder in remote), reverse=True)
        # at the seam of two blocks some processes read the one and some the other
        needed = sum(sizes[: 2 * shards_per_block])
        if needed > self.limit:
            raise InputError(
                f"The shards of two blocks have {needed} bytes, more than the {self.limit} of the "
                "cache; raise `cache_size`, or lower `shards_per_block`."
            )

    def open(self, shard: Shard) -> BinaryIO:
        """Return a shard for reading, which is fetched first if it is not there.

        An open shard stays readable when it has to go: its bytes live as long as the file is open.
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
            file = part.open("rb")  # before others can see it and take its room
            with FileLock(self.folder / ROOM):  # else who counts now may count it twice
                os.replace(part, path)
        except FileNotFoundError as error:
            raise InputError(
                f"{shard.url} is missing; copy it there, or make the index again with "
                f"`lit-prefopt shards index {shard.folder}`."
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return file

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be made ({error}); name another folder by `cache`."
            ) from error

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Make room for a shard; its part's name holds the bytes that it will need."""
        if shard.size > self.limit:
            raise InputError(
                f"{shard.url} has {shard.size} bytes, more than the {self.limit} of the cache; "
                "raise `cache_size`."
            )
        while True:
            with FileLock(self.folder / ROOM):
                if self._evict(self.limit - shard.size):
                    part.touch()
                    return
            time.sleep(POLL)  # others are fetching; what they have fetched can go

    def _evict(self, most: int) -> bool:
        """Remove the shards that were opened longest ago until no more bytes than that are taken.

        Returns:
            False where those that are on their way take more already.
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
                    part.unlink(missing_ok=True)  # of a process that was killed
            except Timeout:  # on its way
                yield int(size)

    def _lock(self, path: Path) -> Path:
        return path.with_suffix(".lock")


def default_folder() -> Path:
    """Return the folder of the cache where none is named."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lit-prefopt"


class _WrongSizeError(Exception):
    """What came is not what was indexed; a transfer cut short looks the same, so it may pass."""

    cost = 3  # attempts: each may be a whole transfer

    def __init__(self, size: Any, shard: Shard) -> None:
        super().__init__(
            f"it has {size} bytes and not {shard.size}: it was cut short or has changed since it "
            f"was indexed, then `lit-prefopt shards index {shard.folder}` helps"
        )


class _SizeLimit(Callback):
    """Stops a transfer that will not have the size that it should have."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard

    def relative_update(self, inc: int = 1) -> None:
        """Note some bytes; the answer was a good one, so its size is that of the shard."""
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
    """Return a name that changes with the index, so that an old content is never taken."""
    name = f"{shard.url}\0{shard.size}\0".encode()
    return blake2s(name + shard.offsets.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _opened(path: Path, size: int) -> BinaryIO | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == size:
        with suppress(PermissionError):  # of another user, who shares the folder
            os.utime(file.fileno())  # opened last, removed last
        return file
    file.close()
    return None


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        try:
            yield path, path.stat()
        except FileNotFoundError:  # another process made room
            continue
