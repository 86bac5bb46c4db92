"""Read single samples of shards by random access."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2s
from io import BytesIO
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.format import EXTENSIONS, IMAGES, SIDES, Shard
from lit_prefopt.data.shards.index import sample_key
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.data.shards.sides import Known, missing_in, names_in, picked_meta
from lit_prefopt.data.shards.tar import (
    DuplicateMember,
    group_members,
    is_plain,
    iterate_members,
)
from lit_prefopt.errors import InputError
from lit_prefopt.utils.filesystem import filesystem, is_local
from lit_prefopt.utils.lru import LRUCache

OPEN_FILES = 32  # several blocks' worth of shards
MAX_BYTES = 1 << 30  # maximum of one sample; a file with holes claims any size


class Sample(NamedTuple):
    """One sample as stored."""

    name: str  # "shard.tar/000001"
    text: str
    sides: list[bytes]  # encoded images, best side first
    mask: bytes | None
    meta: dict[str, Any]
    names: tuple[str, ...] = SIDES  # of its sides

    @property
    def side_count(self) -> int:
        """Number of its images."""
        return len(self.sides)

    def best_and_worst(self) -> Sample:
        """Return a sample of its best and its worst side; unchanged if it has no more."""
        if len(self.sides) <= len(SIDES):
            return self
        meta = picked_meta(self.meta, len(self.sides), (0, len(self.sides) - 1))
        images, names = self.sides, self.names
        return self._replace(sides=[images[0], images[-1]], names=(names[0], names[-1]), meta=meta)


class ShardReader:
    """Reads single samples of local or remote shards of images.

    Args:
        shards: The shards, as `read_index` returns them.
        cache: Cache folder of remote shards; by default the user's own.
    """

    pairs_only: bool = False
    """Whether only the best and the worst side of a ranked list are returned."""

    required: tuple[Known, ...] = ()
    """What must be known of each side of a sample, or it is broken."""

    KIND: ClassVar[str] = IMAGES
    """Kind of the samples."""

    CURE: ClassVar[str] = "train on them with `--data CachedPairs`, or use shards of images here"
    """Remedy for shards of another kind."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache | None = None) -> None:
        self.shards = shards
        self.cache = cache or ShardCache()
        self._forget()

    @property
    def counts(self) -> list[int]:
        """Number of samples in each shard."""
        return [len(shard.offsets) for shard in self.shards]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker, without open files."""
        return {name: value for name, value in vars(self).items() if name[0] != "_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state in a worker, without open files."""
        self.__dict__.update(state)
        self._forget()

    def check(self) -> Self:
        """Check the kind of all shards before reading."""
        for shard in self.shards:
            self._check_kind(shard)
        return self

    def __call__(self, shard: int, sample: int) -> Any:
        """Read a sample; raise BrokenSample with its name if it cannot be used."""
        self._check_kind(self.shards[shard])
        members = self.members(shard, sample)
        name = f"{self.shards[shard].name}/{members['__key__']}"
        try:
            stored = self.parse(name, members)
        except BrokenSample as error:
            raise BrokenSample(f"{name} {error}") from error
        if missing := missing_in(stored.meta, stored.side_count, self.required):
            raise BrokenSample(f"{name} has no {missing} of all its images in its .json")
        return stored.best_and_worst() if self.pairs_only else stored

    def parse(self, name: str, members: Mapping[str, Any]) -> Any:
        """Parse a sample from its members."""
        return parse(name, members)

    def members(self, shard: int, sample: int) -> dict[str, Any]:
        """Read the members of a sample of any kind: bytes by extension, and its `__key__`."""
        source = self.shards[shard]
        try:
            return unpack(self._bytes(shard, *bounded_span(source, sample)))
        except BrokenSample as error:
            raise BrokenSample(f"{source.name}, sample {sample}, {error}") from error

    def fingerprint(self, samples: int) -> str:
        """Return a fingerprint of the shards.

        Args:
            samples: Number of samples to include, from the first one on.
        """
        shards = [(shard.name, shard.size, len(shard.offsets)) for shard in self.shards]
        return blake2s(json.dumps([shards, samples]).encode(), digest_size=8).hexdigest()

    def text(self, shard: int, sample: int) -> str:
        """Read only a sample's prompt, skipping its images."""
        source = self.shards[shard]
        start, stop = source.span(sample)
        with self._at(shard, start) as file:
            try:
                data = _text(file, stop)
            except tarfile.TarError as error:
                raise BrokenSample(f"{source.name}, sample {sample}, {_damaged(error)}") from error
        try:
            return _prompt({} if data is None else {"txt": data})
        except BrokenSample as error:
            raise BrokenSample(f"{source.name}, sample {sample}, {error}") from error

    def _check_kind(self, shard: Shard) -> None:
        if shard.kind != self.KIND:
            raise InputError(f"{shard.folder} contains {shard.kind}: {self.CURE}.")

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        with self._at(number, start) as file:
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise _changed(self.shards[number])
        return data

    @contextmanager
    def _at(self, number: int, start: int) -> Iterator[BinaryIO]:
        """Yield the file of a shard, positioned at an offset."""
        if self._process != os.getpid():  # a forked worker shares file positions with its parent
            self._forget()
        try:
            file = self._files(number)
            file.seek(start)
            yield file
        except OSError as error:
            url = self.shards[number].url
            raise InputError(f"{url} cannot be read ({error}); check the path.") from error

    def _open(self, number: int) -> BinaryIO:
        shard = self.shards[number]
        fs, path = filesystem(shard.url)
        if not is_local(fs):
            self._close_removed()
            return self.cache.open(shard)
        file = open(path, "rb")  # noqa: SIM115 - closed on eviction
        if os.fstat(file.fileno()).st_size != shard.size:
            file.close()
            raise _changed(shard)
        return file

    def _close_removed(self) -> None:
        """Close files that the cache has removed, which frees their disk space."""
        for number, file in list(self._files.values.items()):
            if not os.fstat(file.fileno()).st_nlink:
                self._files.values.pop(number).close()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: LRUCache[int, BinaryIO]
        self._files = LRUCache(OPEN_FILES, self._open, lambda file: file.close())


def bounded_span(shard: Shard, sample: int) -> tuple[int, int]:
    """Return the first byte of a sample and the one after its last; raise BrokenSample for many.

    Args:
        shard: The shard.
        sample: Number of the sample in it.
    """
    start, stop = shard.span(sample)
    if stop - start > MAX_BYTES:
        raise BrokenSample(f"is too large with {stop - start} bytes")
    return start, stop


def unpack(data: bytes) -> dict[str, Any]:
    """Parse the tar members of one sample: bytes by extension, and its `__key__`."""
    try:
        samples = list(group_members(_members(data)))
    except DuplicateMember as error:
        raise BrokenSample(str(error)) from error
    except Exception as error:  # tarfile raises many types for broken headers
        raise BrokenSample(_damaged(error)) from error
    if len(samples) != 1:
        raise BrokenSample(f"has {len(samples)} samples instead of one as in the index")
    return samples[0]


def parse(name: str, members: Mapping[str, Any], sides: tuple[str, ...] | None = None) -> Sample:
    """Parse a sample from its members.

    Args:
        name: Name of the sample, for messages.
        members: Bytes by extension, as `unpack` returns them; unknown ones are ignored.
        sides: Names of its images, best side first; by default those that its members have.
    """
    text = _prompt(members)
    names = names_in(members) if sides is None else sides
    images = [_image(members, side) for side in names]
    meta = _meta(members.get("json", b"{}"))
    return Sample(name, text, images, members.get("mask.png"), meta, names)


def _prompt(members: Mapping[str, Any]) -> str:
    if "txt" not in members:
        raise BrokenSample("has no prompt (.txt)")
    try:
        return str(members["txt"], "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample("has a prompt that is not UTF-8") from error


def _text(file: BinaryIO, stop: int) -> bytes | None:
    """Read the .txt of the sample from the current offset to `stop`, or return None."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in iterate_members(tar):
            if member.offset >= stop:
                break
            key = sample_key(member.name) if is_plain(member) else None
            if key is None or member.name[len(key) + 1 :].lower() != "txt":
                continue
            data = tar.extractfile(member)
            return data.read(stop - member.offset) if data is not None else None
    return None


def _damaged(error: Exception) -> str:
    return (
        f"is not part of a tar ({error}): the shard is damaged or was changed after it was indexed"
    )


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    # "r:" and plain files only: a compressed or sparse member could expand to any size
    with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
        for member in iterate_members(tar):
            if not is_plain(member):
                continue
            file = tar.extractfile(member)
            if file is not None and sample_key(member.name) is not None:
                yield member.name, file.read()


def _image(members: Mapping[str, Any], side: str) -> bytes:
    for extension in EXTENSIONS:
        if f"{side}.{extension}" in members:
            return bytes(members[f"{side}.{extension}"])
    raise BrokenSample(f"has no {side} image ({', '.join(EXTENSIONS)})")


def _meta(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenSample("has a .json that is not JSON") from error
    if not isinstance(meta, dict):
        raise BrokenSample("has a .json that is not a mapping")
    return meta


def _changed(shard: Shard) -> InputError:
    return InputError(
        f"{shard.url} has changed since it was indexed; "
        f"make the index again with `lit-prefopt shards index --folder {shard.folder}`."
    )
