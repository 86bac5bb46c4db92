"""Read tars in webdataset's layout.

A sample is KEY.original_prompt.txt, KEY.jpg_0.jpg, KEY.jpg_1.jpg, KEY.label_0.txt, or whatever
else the columns name: the part between key and last extension is the member's name. What has no
member of its own may be in the sample's KEY.json.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from itertools import groupby
from pathlib import Path
from typing import Any

from lit_prefopt.data.shards.tar import is_plain, iterate_members, split_name
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.encodings import decode_text
from lit_prefopt.prepare.source_rows import MAX_BYTES, BrokenRecord, RawRecord

TEXTS = ("txt", "text", "cls")  # extensions of texts; cls is webdataset's for a label
Members = list[tuple[str, tarfile.TarInfo]]  # with their kind, such as "chosen.jpg"


def tar_samples(path: Path, columns: Columns, only: Set[str]) -> Iterator[RawRecord]:
    """Yield the samples of a tar.

    Args:
        path: An uncompressed tar in which the members of a sample are adjacent.
        columns: Names of the members.
        only: Names of the members to read; all others are skipped.
    """
    try:
        # "r:" refuses compressed tars, which could expand to any size
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a tar ({error}); copy it again, and decompress it if it is "
            "compressed."
        ) from error
    last, seen = "its beginning", set[str]()
    with tar:
        try:
            for stem, members in groupby(_members(tar), lambda member: _key(member.name)):
                for key, kinds in _samples(str(stem), members, columns):
                    where = f"{path}/{key}"
                    if key in seen:
                        reason = (
                            "comes a second time; its members are not adjacent, or some were "
                            "appended later: unpack the tar and pack it with `tar --sort=name`"
                        )
                        yield RawRecord(where, {}, path.parent, reason)
                        continue
                    seen.add(key)
                    yield _row(path, where, kinds, tar, columns, only)
                    last = key
        except (tarfile.TarError, OSError) as error:
            reason = f"is truncated after {last} ({error})"
            yield RawRecord(str(path), {}, path.parent, reason)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    yield from (one for one in iterate_members(tar) if is_plain(one) and _key(one.name))
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        # tarfile treats half a header as the end
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def _samples(
    stem: str, members: Iterable[tarfile.TarInfo], columns: Columns
) -> Iterator[tuple[str, Members]]:
    """Yield the samples of one stem, usually one; several if their keys have dots.

    In img_v1.0_0001.chosen.jpg webdataset ends the key at the first dot. If no name of the stem is
    known, but those before the last extension are, the key is all that is before them.
    """
    kinds = [((split_name(member.name)[1] or "").lower(), member) for member in members]
    names = {name.lower() for name in columns.all()}
    dotted = defaultdict[str, Members](list)
    if not any(_name(kind) in names for kind, _ in kinds):
        for kind, _ in kinds:
            key, _, rest = kind.rpartition(".")[0].rpartition(".")
            if key and rest in names:
                dotted[key] = []
    if not dotted:
        yield stem, kinds
        return
    for kind, member in kinds:
        key = kind
        while key and key not in dotted:
            key = key.rpartition(".")[0]
        if key:
            dotted[key].append((kind[len(key) + 1 :], member))
    for key, own in dotted.items():
        yield f"{stem}.{key}", own


def _row(
    path: Path,
    where: str,
    kinds: Members,
    tar: tarfile.TarFile,
    columns: Columns,
    only: Set[str],
) -> RawRecord:
    known = {name.lower(): name for name in columns.all()}
    there = tuple(kind for kind, _ in kinds)
    counts = Counter(known[_name(kind)] for kind in there if _name(kind) in known)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        reason = f"has {twice[0]} twice; keep one of the two members"
        return RawRecord(where, {}, path.parent, reason)
    values, more = dict[str, Any](), dict[str, Any]()
    try:
        for kind, member in kinds:
            name = known.get(_name(kind))
            if kind == "json" and name is None:
                more = _mapping(_read(kind, member, tar))
            elif name is not None and name in only:
                data = _read(kind, member, tar)
                values[name] = decode_text(data) if kind.rpartition(".")[2] in TEXTS else data
    except BrokenRecord as error:
        return RawRecord(where, {}, path.parent, str(error))
    return RawRecord(where, columns.complete(values, more), path.parent, "", (*there, *more))


def _read(kind: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes:
    if member.size > MAX_BYTES:
        raise BrokenRecord(f"has a {kind} of {member.size} bytes")
    file = tar.extractfile(member)
    return file.read() if file else b""


def _mapping(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord("has a .json that is not JSON") from error
    return values if isinstance(values, dict) else {}


def _name(kind: str) -> str:
    """Return the name in a kind: chosen of chosen.jpg, txt of txt."""
    return kind.rpartition(".")[0] or kind


def _key(name: str) -> str | None:
    return split_name(name)[0]
