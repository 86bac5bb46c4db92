"""The index of a folder of shards: where every sample lies, so that reading can start anywhere.

A shard is a plain tar in webdataset's layout: 000001.txt, 000001.chosen.jpg, 000001.rejected.jpg,
and optionally 000001.json and 000001.mask.png, side by side. `index.json` lies beside the tars. In
a shard of cached latents 000001.cache.safetensors stands in the images' place.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
from webdataset.tariterators import base_plus_ext

from lit_prefopt.data.images import Size, upright_size
from lit_prefopt.data.shards.format import (
    CACHED,
    EXTENSIONS,
    INDEX,
    LATENTS,
    SIDES,
    Shard,
    dump,
    parse,
    stale_index_error,
)
from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.filesystem import filesystem, is_local, retry

BEST = [f"{SIDES[0]}.{extension}" for extension in EXTENSIONS]


def read_index(folder: str | Path) -> list[Shard]:
    """Return the shards of a folder after a check that the index still fits them.

    Args:
        folder: Path or URL of a folder that holds shards and their index.json.
    """
    folder = str(folder).rstrip("/")
    fs, path = filesystem(folder)
    try:
        text = retry(f"{folder}/{INDEX}", lambda: fs.cat_file(f"{path}/{INDEX}"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_local(fs) and not fs.isdir(path):
            raise InputError(f"There is no folder {folder}; check the path.") from error
        raise InputError(
            f"{folder} has no {INDEX}; make it with `lit-prefopt shards index {folder}`."
        ) from error
    shards = parse(folder, text)
    if is_local(fs):  # sizes of remote shards are looked at when they are fetched
        _check_sizes(fs, folder, path, shards)
    return shards


def write_index(folder: str | Path, shards: Iterable[Shard]) -> None:
    """Write the index of a local folder, whole or not at all."""
    write_atomic(Path(folder) / INDEX, dump(shards))


def index_shards(folder: str) -> None:
    """Write the index.json of a folder of tars: where every sample lies, and how large it is.

    Args:
        folder: A local folder of plain, uncompressed tars in webdataset's layout.
    """
    tars = sorted(Path(folder).glob("*.tar"))
    if not tars:
        raise InputError(f"{folder} holds no .tar file; name the folder that the shards are in.")
    shards = [scan_shard(tar) for tar in tars]
    write_index(folder, shards)
    samples = sum(len(shard.offsets) for shard in shards)
    print(f"{Path(folder) / INDEX}: {len(shards)} shards, {samples} samples")


def scan_shard(tar: Path) -> Shard:
    """Return where the samples of a tar lie, found by walking through its headers."""
    try:
        with tarfile.open(tar, "r:") as members:  # "r:": a compressed tar has no byte offsets
            found = list(_samples(tar, members))
        with tar.open("rb") as file:
            file.seek(members.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                # tarfile takes half a header for the end, and the samples behind it were lost
                raise tarfile.ReadError(f"no header and no end at byte {members.offset}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}); copy it again, unpacked if it is compressed."
        ) from error
    offsets = np.asarray([sample.offset for sample in found], np.int64)
    size, folder = tar.stat().st_size, str(tar.parent)
    # in a mixed shard a run names the samples that are not of its kind
    if found and all(sample.cached for sample in found):
        return Shard(tar.name, size, offsets, folder, kind=LATENTS)
    sizes = np.asarray([sample.size for sample in found], np.int32).reshape(-1, 2)
    return Shard(tar.name, size, offsets, folder, sizes)


def sample_key(name: str) -> str | None:
    """Return the key of the sample that a member belongs to, None for one that belongs to none."""
    key: str | None = base_plus_ext(name)[0]
    return None if key is None or name.startswith("__") else key  # __*: webdataset's own notes


@dataclass
class _SampleSpan:
    offset: int
    size: Size = (0, 0)  # of the best side, as far as it was found
    cached: bool = False  # whether it holds latents


def _samples(tar: Path, members: tarfile.TarFile) -> Iterable[_SampleSpan]:
    samples: dict[str, _SampleSpan] = {}
    last = None
    while (member := members.next()) is not None:
        members.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        key = sample_key(member.name) if member.isreg() else None
        if key is None:
            continue
        if key != last and key in samples:
            raise InputError(
                f"{tar}: the members of sample {key} do not lie side by side; "
                "make the tar again with `tar --sort=name`."
            )
        sample = samples.setdefault(key, _SampleSpan(member.offset))
        last = key
        extension = member.name[len(key) + 1 :].lower()
        sample.cached |= extension == CACHED
        if extension in BEST:
            file = members.extractfile(member)
            sample.size = upright_size(file) if file else (0, 0)
    return samples.values()


def _check_sizes(
    fs: fsspec.AbstractFileSystem, folder: str, path: str, shards: list[Shard]
) -> None:
    sizes = {Path(entry["name"]).name: entry["size"] for entry in fs.ls(path, detail=True)}
    for shard in shards:
        if shard.name not in sizes:
            raise stale_index_error(folder, f"names {shard.name}, which is missing")
        if sizes[shard.name] != shard.size:
            raise stale_index_error(folder, f"is older than {shard.name}, whose size has changed")
