"""The index of a folder of shards: where every sample lies, so that reading can start anywhere.

A shard is a plain tar in webdataset's layout: 000001.txt, 000001.chosen.jpg, 000001.rejected.jpg,
and optionally 000001.json and 000001.mask.png, side by side. `index.json` lies beside the tars.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from lit_prefopt.data.files import filesystem, is_local
from lit_prefopt.errors import InputError
from lit_prefopt.whole_files import write_whole

INDEX = "index.json"
VERSION = 1


class Shard(NamedTuple):
    """One tar and the byte at which each of its samples begins."""

    name: str  # a file name, no path
    size: int  # of the tar, in bytes
    offsets: NDArray[np.int64]  # (samples,)
    folder: str = ""  # path or URL of the folder

    @property
    def url(self) -> str:
        """Path or URL of the tar."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    def span(self, sample: int) -> tuple[int, int]:
        """Return the first byte of a sample and the one after its last."""
        end = self.offsets[sample + 1] if sample + 1 < len(self.offsets) else self.size
        return int(self.offsets[sample]), int(end)


def read_index(folder: str | Path) -> list[Shard]:
    """Return the shards of a folder after a check that the index still fits them.

    Args:
        folder: Path or URL of a folder that holds shards and their index.json.
    """
    folder = str(folder).rstrip("/")
    fs, path = filesystem(folder)
    try:
        content = json.loads(fs.cat_file(f"{path}/{INDEX}"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {INDEX}; make it with `lit-prefopt shards index {folder}`."
        ) from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise _stale(folder, "is no JSON") from error
    except OSError as error:
        raise InputError(f"{folder}/{INDEX} cannot be read ({error}); check the path.") from error
    shards = _parse(folder, content)
    if is_local(fs):  # sizes of remote shards are looked at when they are opened
        _check_sizes(fs, folder, path, shards)
    return shards


def write_index(folder: str | Path, shards: Iterable[Shard]) -> None:
    """Write the index of a local folder, whole or not at all."""
    rows = [{"name": s.name, "size": s.size, "offsets": s.offsets.tolist()} for s in shards]
    text = json.dumps({"version": VERSION, "shards": rows}, separators=(",", ":"))
    write_whole(Path(folder) / INDEX, text)


def index_shards(folder: str) -> None:
    """Write the index.json of a folder of tars that somebody else made.

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
            offsets = list(_starts(tar, members))
        with tar.open("rb") as file:
            file.seek(members.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                # tarfile takes half a header for the end, and the samples behind it were lost
                raise tarfile.ReadError(f"no header and no end at byte {members.offset}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}); copy it again, unpacked if it is compressed."
        ) from error
    return Shard(tar.name, tar.stat().st_size, np.asarray(offsets, np.int64), str(tar.parent))


def sample_key(name: str) -> str | None:
    """Return the key of the sample that a member belongs to, None for one that belongs to none."""
    key: str | None = base_plus_ext(name)[0]
    return None if key is None or name.startswith("__") else key  # __*: webdataset's own notes


def _starts(tar: Path, members: tarfile.TarFile) -> Iterable[int]:
    seen: set[str] = set()
    last = None
    while (member := members.next()) is not None:
        members.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        key = sample_key(member.name) if member.isreg() else None
        if key is None or key == last:
            continue
        if key in seen:
            raise InputError(
                f"{tar}: the members of sample {key} do not lie side by side; "
                "make the tar again with `tar --sort=name`."
            )
        seen.add(key)
        last = key
        yield member.offset


def _parse(folder: str, content: Any) -> list[Shard]:
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise _stale(folder, "lists no shards")
    if content.get("version") != VERSION:
        raise _stale(folder, f"has version {content.get('version')!r} instead of {VERSION}")
    return [_parse_shard(folder, row) for row in content["shards"]]


def _parse_shard(folder: str, row: Any) -> Shard:
    try:
        name, size, offsets = row["name"], row["size"], np.asarray(row["offsets"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise _stale(folder, "has a shard without name, size or offsets") from error
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise _stale(folder, f"names the shard {name!r}, which is no plain file name")
    if not offsets.size:
        offsets = offsets.astype(np.int64)
    rising = offsets.ndim == 1 and offsets.dtype == np.int64 and bool((np.diff(offsets) > 0).all())
    inside = (
        rising
        and isinstance(size, int)
        and (not offsets.size or bool(offsets[0] >= 0 and offsets[-1] < size))
    )
    if not inside:
        raise _stale(folder, f"has offsets that do not fit {name}")
    return Shard(name, size, offsets, folder)


def _check_sizes(
    fs: fsspec.AbstractFileSystem, folder: str, path: str, shards: list[Shard]
) -> None:
    sizes = {Path(entry["name"]).name: entry["size"] for entry in fs.ls(path, detail=True)}
    for shard in shards:
        if shard.name not in sizes:
            raise _stale(folder, f"names {shard.name}, which is missing")
        if sizes[shard.name] != shard.size:
            raise _stale(folder, f"is older than {shard.name}, whose size has changed")


def _stale(folder: str, what: str) -> InputError:
    return InputError(
        f"{folder}/{INDEX} {what}; make it again with `lit-prefopt shards index {folder}`."
    )
