"""Read and write tar members in webdataset's layout, without importing torch.

The members of a sample are adjacent and share a key: `000001.txt`, `000001.chosen.jpg`, ...
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO

KEY = "__key__"
MODE = 0o644
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


def iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar in order, without keeping their headers in memory.

    Args:
        tar: A tar opened for reading.

    Raises:
        tarfile.ReadError: A header is broken, or claims a size that its place does not have.
    """
    while (member := _next(tar)) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or all headers stay in memory
        if tar.offset < member.offset_data:  # tarfile would read the same headers for ever
            raise tarfile.ReadError(f"the member at byte {member.offset} has a negative size")
        if is_plain(member) and member.offset_data + member.size > tar.offset:
            raise tarfile.ReadError(f"the member at byte {member.offset} has a wrong size")
        yield member


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # tarfile raises many types for broken pax headers
        raise tarfile.ReadError(f"broken headers at byte {tar.offset}: {error}") from error


def is_plain(member: tarfile.TarInfo) -> bool:
    """Return whether a member is a file as stored: no link or device, and not sparse.

    A sparse member unfolds to any size; its headers may give it the type of a plain file.
    """
    return member.type in PLAIN and not member.issparse()


class DuplicateMember(ValueError):
    """A sample has two members of the same extension."""


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Split a member's name into key and extensions, both None without an extension.

    Args:
        name: A name such as `folder/000001.chosen.jpg`, which gives `folder/000001`, `chosen.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension) if stem and dot else (None, None)


def group_members(members: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, str | bytes]]:
    """Group members into samples: bytes by lower-case extension, and the key.

    Args:
        members: Names and contents in the order of the tar.

    Raises:
        DuplicateMember: A sample has an extension twice.
    """
    sample: dict[str, str | bytes] = {}
    for name, data in members:
        key, extension = split_name(name)
        if key is None or extension is None:
            continue
        if sample and key != sample[KEY]:
            yield sample
            sample = {}
        sample.setdefault(KEY, key)
        if extension.lower() in sample:
            raise DuplicateMember(f"has {extension.lower()} twice; keep one of the two members")
        sample[extension.lower()] = data
    if sample:
        yield sample


def write_members(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Write a sample, its members sorted by extension; neither time nor owner is stored.

    Args:
        tar: A tar opened for writing.
        key: Name of the sample.
        members: Bytes by extension.
    """
    for extension, data in sorted(members.items()):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size, member.mode, member.mtime = len(data), MODE, 0
        tar.addfile(member, BytesIO(data))
