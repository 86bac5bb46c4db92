"""Reading one sample out of the middle of a shard."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2s
from io import BytesIO
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

from webdataset.tariterators import group_by_keys

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.format import EXTENSIONS, IMAGES, SIDES, Shard
from lit_prefopt.data.shards.index import sample_key
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.errors import InputError
from lit_prefopt.utils.filesystem import filesystem, is_local
from lit_prefopt.utils.lru import LRUCache

OPEN_FILES = 32  # several blocks' worth of shards


class Sample(NamedTuple):
    """One sample as it is stored."""

    name: str  # "shard.tar/000001"
    text: str
    sides: list[bytes]  # encoded images, best side first
    mask: bytes | None
    meta: dict[str, Any]


class ShardReader:
    """Reads single samples of local or remote shards of images.

    Args:
        shards: The shards, as `read_index` returns them.
        sides: Names of the images of a sample, best side first.
        cache: Where remote shards are kept once they were fetched; none: the user's own folder.
    """

    KIND: ClassVar[str] = IMAGES
    """What the samples hold."""

    CURE: ClassVar[str] = "`--data CachedPairs` trains on them, and images are wanted here"
    """What to do with shards that hold something else."""

    def __init__(
        self,
        shards: Sequence[Shard],
        sides: Sequence[str] = SIDES,
        cache: ShardCache | None = None,
    ) -> None:
        self.shards, self.sides = shards, sides
        self.cache = cache or ShardCache()
        self._forget()

    @property
    def counts(self) -> list[int]:
        """How many samples each shard holds."""
        return [len(shard.offsets) for shard in self.shards]

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels to a worker: no open files."""
        return {"shards": self.shards, "sides": self.sides, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start in a worker, with no file open."""
        self.__dict__.update(state)
        self._forget()

    def check(self) -> Self:
        """Refuse shards that hold something else, before one of them is read."""
        for shard in self.shards:
            self._check_kind(shard)
        return self

    def __call__(self, shard: int, sample: int) -> Any:
        """Return a sample; raise BrokenSample, which names it, if it cannot be used."""
        self._check_kind(self.shards[shard])
        members = self.members(shard, sample)
        name = f"{self.shards[shard].name}/{members['__key__']}"
        try:
            return self.parse(name, members)
        except BrokenSample as error:
            raise BrokenSample(f"{name} {error}") from error

    def parse(self, name: str, members: Mapping[str, Any]) -> Any:
        """Return the sample that these members make, here a `Sample`."""
        return parse(name, members, self.sides)

    def members(self, shard: int, sample: int) -> dict[str, Any]:
        """Return the bytes of a sample of whatever kind, by extension, and its `__key__`."""
        source = self.shards[shard]
        data = self._bytes(shard, *source.span(sample))
        try:
            return unpack(data)
        except BrokenSample as error:
            raise BrokenSample(f"{source.name}, sample {sample}, {error}") from error

    def fingerprint(self, samples: int) -> str:
        """Return a short text that two lists share only if they have the same shards.

        Args:
            samples: How many of their samples are meant, from the first one on.
        """
        shards = [(shard.name, shard.size, len(shard.offsets)) for shard in self.shards]
        return blake2s(json.dumps([shards, samples]).encode(), digest_size=8).hexdigest()

    def text(self, shard: int, sample: int) -> str:
        """Return a sample's prompt alone: of its images no more than the headers are read."""
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
            raise InputError(f"{shard.folder} holds {shard.kind}: {self.CURE}.")

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        with self._at(number, start) as file:
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise _changed(self.shards[number])
        return data

    @contextmanager
    def _at(self, number: int, start: int) -> Iterator[BinaryIO]:
        """Give the file of a shard, to be read from there on."""
        if self._process != os.getpid():  # a forked worker must not move its parent's files
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
        file = open(path, "rb")  # noqa: SIM115 - closed when it has to make room
        if os.fstat(file.fileno()).st_size != shard.size:
            file.close()
            raise _changed(shard)
        return file

    def _close_removed(self) -> None:
        """Close what the cache has removed: only then does the disk get its room back."""
        for number, file in list(self._files.values.items()):
            if not os.fstat(file.fileno()).st_nlink:
                self._files.values.pop(number).close()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: LRUCache[int, BinaryIO]
        self._files = LRUCache(OPEN_FILES, self._open, lambda file: file.close())


def unpack(data: bytes) -> dict[str, Any]:
    """Return the members of one sample by their extension, and its `__key__`."""
    try:
        samples = list(group_by_keys(_members(data)))
    except Exception as error:  # whatever tarfile makes of a broken header
        raise BrokenSample(_damaged(error)) from error
    if len(samples) != 1:
        raise BrokenSample(f"holds {len(samples)} samples where the index says one")
    return samples[0]


def parse(name: str, members: Mapping[str, Any], sides: Sequence[str] = SIDES) -> Sample:
    """Return the sample that these members make.

    Args:
        name: Name of the sample, for messages.
        members: Bytes by extension, as `unpack` returns them; unknown ones are left alone.
        sides: Names of the images of a sample, best side first.
    """
    text = _prompt(members)
    images = [_image(members, side) for side in sides]
    return Sample(name, text, images, members.get("mask.png"), _meta(members.get("json", b"{}")))


def _prompt(members: Mapping[str, Any]) -> str:
    if "txt" not in members:
        raise BrokenSample("has no prompt (.txt)")
    try:
        return str(members["txt"], "utf-8")
    except UnicodeDecodeError as error:
        raise BrokenSample("has a prompt that is not UTF-8") from error


def _text(file: BinaryIO, stop: int) -> bytes | None:
    """Return the .txt of the sample that begins here and ends before `stop`, if it has one."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None and member.offset < stop:
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            key = sample_key(member.name) if plain else None
            if key is None or member.name[len(key) + 1 :].lower() != "txt":
                continue
            data = tar.extractfile(member)
            return data.read(stop - member.offset) if data is not None else None
    return None


def _damaged(error: Exception) -> str:
    return (
        f"is no part of a tar ({error}): the shard is damaged or was changed after it was indexed"
    )


def _members(data: bytes) -> Iterator[dict[str, Any]]:
    # "r:" and plain files only: a compressed or sparse member could unfold to any size
    with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                continue
            file = tar.extractfile(member)
            if file is not None and sample_key(member.name) is not None:
                yield {"fname": member.name, "data": file.read(), "__url__": ""}


def _image(members: Mapping[str, Any], side: str) -> bytes:
    for extension in EXTENSIONS:
        if f"{side}.{extension}" in members:
            return bytes(members[f"{side}.{extension}"])
    raise BrokenSample(f"has no {side} image ({', '.join(EXTENSIONS)})")


def _meta(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenSample("has a .json that is no JSON") from error
    if not isinstance(meta, dict):
        raise BrokenSample("has a .json that is no mapping")
    return meta


def _changed(shard: Shard) -> InputError:
    return InputError(
        f"{shard.url} has changed since it was indexed; "
        f"make the index again with `lit-prefopt shards index {shard.folder}`."
    )
