"""Read tars in webdataset's layout.

A sample is KEY.original_prompt.txt, KEY.jpg_0.jpg, KEY.jpg_1.jpg, KEY.label_0.txt, or whatever
else the columns name: the part between key and last extension is the member's name.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Set
from itertools import groupby
from pathlib import Path
from typing import Any

from lit_prefopt.data.shards.tar import is_plain, iterate_members, split_name
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.source_rows import MAX_BYTES, RawRecord


def tar_samples(path: Path, names: Set[str]) -> Iterator[RawRecord]:
    """Yield the samples of a tar.

    Args:
        path: An uncompressed tar in which the members of a sample are adjacent.
        names: Names of the members to read; all others are skipped.
    """
    try:
        # "r:" refuses compressed tars, which could expand to any size
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a tar ({error}); copy it again, and decompress it if it is "
            "compressed."
        ) from error
    last = "its beginning"
    with tar:
        try:
            for key, members in groupby(_members(tar), lambda member: _key(member.name)):
                yield _row(path, str(key), {m.name: m for m in members}, tar, names)
                last = str(key)
        except (tarfile.TarError, OSError) as error:
            yield RawRecord(str(path), {}, path.parent, f"is truncated after {last} ({error})")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    yield from (one for one in iterate_members(tar) if is_plain(one) and _key(one.name))
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        # tarfile treats half a header as the end
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def _row(
    path: Path,
    key: str,
    members: dict[str, tarfile.TarInfo],
    tar: tarfile.TarFile,
    names: Set[str],
) -> RawRecord:
    where, values = f"{path}/{key}", dict[str, Any]()
    for member in members.values():
        kind = split_name(member.name)[1] or ""
        name, _, extension = kind.rpartition(".") if "." in kind else (kind, "", kind)
        if name not in names:
            continue
        if member.size > MAX_BYTES:
            return RawRecord(where, {}, path.parent, f"has a {kind} of {member.size} bytes")
        file = tar.extractfile(member)
        data = file.read() if file else b""
        text = extension in ("txt", "text")
        values[name] = data.decode(errors="surrogateescape") if text else data
    return RawRecord(where, values, path.parent)


def _key(name: str) -> str | None:
    return split_name(name)[0]
