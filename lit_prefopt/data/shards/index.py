"""Index of a folder of shards: the offsets of all samples, for random access.

A shard is a plain tar in webdataset's layout: 000001.txt, 000001.chosen.jpg, 000001.rejected.jpg,
and optionally 000001.json and 000001.mask.png, adjacent. `index.json` is beside the tars. A
shard of cached latents has 000001.cache.safetensors instead of the images. Ranked lists and single
images have other names of images (`sides.py`).
"""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import fsspec
import numpy as np

from lit_prefopt.data.images import Size, upright_size
from lit_prefopt.data.shards.format import (
    CACHED,
    EXTENSIONS,
    INDEX,
    LATENTS,
    MOST_SIDES,
    SIDES,
    Shard,
    dump,
    parse,
    stale_index_error,
)
from lit_prefopt.data.shards.sides import SINGLE, is_side, names_in
from lit_prefopt.data.shards.tar import is_plain, iterate_members, split_name
from lit_prefopt.errors import InputError
from lit_prefopt.utils.addresses import check_address
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.filesystem import check_regular, filesystem, is_local, read_whole

BEST = [f"{side}.{end}" for side in (SIDES[0], "rank1", *SINGLE) for end in EXTENSIONS]
LONGEST_HEADER = 1 << 20  # bytes of the header of a sample's latents


def read_index(folder: str | Path) -> list[Shard]:
    """Read the index of a folder, and check that it still matches the shards.

    Args:
        folder: Path or URL of a folder with shards and their index.json.
    """
    check_address(str(folder))
    folder = str(folder).rstrip("/")
    fs, path = filesystem(folder)
    try:
        text = read_whole(f"{folder}/{INDEX}")
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_local(fs) and not fs.isdir(path):
            raise InputError(f"There is no folder {folder}; check the path.") from error
        if is_local(fs) and not any(Path(path).glob("*.tar")):
            inner = [f"{folder}/{found.parent.name}" for found in Path(path).glob(f"*/{INDEX}")]
            others = " or ".join(sorted(inner)[:12])
            raise InputError(
                f"{folder} has no shards; name "
                f"{others or 'a folder that `lit-prefopt shards convert` has written'}."
            ) from error
        raise InputError(
            f"{folder} has no {INDEX}; make it with `lit-prefopt shards index --folder "
            f"{shlex.quote(folder)}`."
        ) from error
    shards = parse(folder, text)
    if is_local(fs):  # sizes of remote shards are checked when they are fetched
        _check_sizes(fs, folder, path, shards)
    return shards


def write_index(folder: str | Path, shards: Iterable[Shard]) -> None:
    """Write the index of a local folder atomically."""
    write_atomic(Path(folder) / INDEX, dump(shards))


def index_shards(folder: str) -> None:
    """Write the index.json of a folder of tars: offsets and image sizes of all samples.

    Args:
        folder: A local folder of plain, uncompressed tars in webdataset's layout.
    """
    if "://" in folder:
        raise InputError(
            f"{folder} is not a local folder; index a local copy of the shards, and put its "
            f"{INDEX} beside them."
        )
    tars = sorted(tar for tar in Path(folder).glob("*.tar") if tar.is_file())
    if not tars:
        raise InputError(f"{folder} contains no .tar file; name the folder of the shards.")
    shards = [scan_shard(tar) for tar in tars]
    write_index(folder, shards)
    samples = sum(len(shard.offsets) for shard in shards)
    print(f"{Path(folder) / INDEX}: {len(shards)} shards, {samples} samples")


def scan_shard(tar: Path) -> Shard:
    """Scan the headers of a tar and return the offsets of its samples."""
    check_regular(tar)
    try:
        with tarfile.open(tar, "r:") as members:  # "r:": a compressed tar has no byte offsets
            found = list(_samples(tar, members))
        with tar.open("rb") as file:
            file.seek(members.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                # tarfile treats half a header as the end, and would lose the samples after it
                raise tarfile.ReadError(f"no header and no end at byte {members.offset}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}); copy it again, and decompress it."
        ) from error
    offsets = np.asarray([sample.offset for sample in found], np.int64)
    size, folder = tar.stat().st_size, str(tar.parent)
    counts = [sample.count for sample in found]
    sides = None if set(counts) <= {len(SIDES)} else np.asarray(counts, np.int32)
    # in a mixed shard, training reports the samples of the other kind
    if found and all(sample.cached for sample in found):
        return Shard(tar.name, size, offsets, folder, kind=LATENTS, sides=sides)
    sizes = np.asarray([sample.size for sample in found], np.int32).reshape(-1, 2)
    return Shard(tar.name, size, offsets, folder, sizes, sides=sides)


def sample_key(name: str) -> str | None:
    """Return the sample key of a member, or None if it belongs to no sample."""
    key: str | None = split_name(name)[0]
    return None if key is None or name.startswith("__") else key  # __*: webdataset's metadata


@dataclass
class _SampleSpan:
    offset: int
    size: Size = (0, 0)  # of the best side, if it was found
    cached: bool = False  # whether it has latents
    dotted: str = ""  # a member whose best side is after a further dot
    count: int = len(SIDES)  # number of its images
    images: list[str] = field(default_factory=list)  # extensions; empty once they are counted


def _samples(tar: Path, members: tarfile.TarFile) -> Iterable[_SampleSpan]:
    samples: dict[str, _SampleSpan] = {}
    last = None
    for member in iterate_members(members):
        key = sample_key(member.name) if is_plain(member) else None
        if key is None:
            continue
        if key != last and key in samples:
            raise InputError(
                f"{tar}: the members of sample {key} are not adjacent, or some were appended "
                "later; unpack the tar and make it again with `tar --sort=name`."
            )
        if key != last and last is not None:
            _count_images(samples[last])
        sample = samples.setdefault(key, _SampleSpan(member.offset))
        last = key
        extension = member.name[len(key) + 1 :].lower()
        if is_side(extension):
            sample.images.append(extension)
        if extension == CACHED:
            sample.cached, sample.count = True, _cached_sides(members.extractfile(member))
        if extension.endswith(tuple(f".{best}" for best in BEST)):
            sample.dotted = member.name
        if extension in BEST:
            file = members.extractfile(member)
            sample.size = upright_size(file) if file else (0, 0)
    if last is not None:
        _count_images(samples[last])
    for sample in samples.values():
        if sample.dotted and sample.size == (0, 0):
            raise InputError(
                f"{tar}: the key of {sample.dotted} has a dot, at which webdataset ends it; write "
                f"shards with other keys by `lit-prefopt shards convert --source {tar} --output "
                "FOLDER`."
            )
    return samples.values()


def _count_images(sample: _SampleSpan) -> None:
    if sample.images:
        sample.count = len(names_in(sample.images))
        sample.images = []


def _cached_sides(file: IO[bytes] | None) -> int:
    """Return the number of sides of cached latents; that of a pair where it cannot be read."""
    if file is None:
        return len(SIDES)
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, LONGEST_HEADER)))
        sides = header["mean"]["shape"][1]
    except (ValueError, LookupError, TypeError, RecursionError):  # reported when it is read
        return len(SIDES)
    return sides if type(sides) is int and 1 <= sides <= MOST_SIDES else len(SIDES)


def _check_sizes(
    fs: fsspec.AbstractFileSystem, folder: str, path: str, shards: list[Shard]
) -> None:
    sizes = {Path(entry["name"]).name: entry["size"] for entry in fs.ls(path, detail=True)}
    for shard in shards:
        if shard.name not in sizes:
            raise stale_index_error(folder, f"lists {shard.name}, which is missing")
        if sizes[shard.name] != shard.size:
            raise stale_index_error(folder, f"is older than {shard.name}, whose size has changed")
