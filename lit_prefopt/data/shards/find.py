"""Find shards by paths, URLs and patterns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import islice

from braceexpand import braceexpand

from lit_prefopt.data.shards.format import SIDES, Shard
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.sides import described, side_counts
from lit_prefopt.errors import InputError
from lit_prefopt.utils.addresses import check_address, check_secrets
from lit_prefopt.utils.filesystem import filesystem, retry

ALL = ""
MOST = 100_000  # folders or tars of one pattern
RANGE = re.compile(r"\{(-?\d{1,99})\.\.(-?\d{1,99})")


def find_shards(patterns: str | Iterable[str]) -> list[Shard]:
    """Return the shards of paths, URLs and patterns, in order.

    Args:
        patterns: Folders with shards and their index.json, or single .tar files of such folders.
            {000..009} and {a,b} expand to their alternatives, `*` matches anything if the file
            system can list a folder (http cannot). Duplicates are removed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("No shards are given; give a folder or a URL.")
    folders: dict[str, list[str]] = {}  # the named tars; ALL: every one
    for path in (path for pattern in patterns for path in _expand(pattern)):
        folder, _, name = path.rpartition("/")
        if name.endswith(".tar"):
            folders.setdefault(folder or ".", []).append(name)
        else:
            folders.setdefault(path.rstrip("/"), []).append(ALL)
    return [shard for folder, names in folders.items() for shard in _chosen(folder, names)]


def find_pairs(patterns: str) -> list[Shard]:
    """Return the shards of paths, URLs and patterns; raise InputError unless all samples are pairs.

    Args:
        patterns: See `find_shards`.
    """
    shards = find_shards(patterns)
    counts = side_counts(shards)
    if counts - {len(SIDES)}:
        raise InputError(
            f"{patterns} has {described(counts)} where pairs are needed; convert pairs (`shards "
            "convert --samples pairs`)."
        )
    return shards


def expand_braces(pattern: str) -> list[str] | None:
    """Return the names that a pattern with braces means, at most MOST + 1.

    Args:
        pattern: A path or URL, such as `pairs/{000..099}.tar`.

    Returns:
        The names; None where a single range has more, which braceexpand would hold in memory.

    Raises:
        ValueError: The braces are unbalanced.
    """
    if any(abs(int(last) - int(first)) > MOST for first, last in RANGE.findall(pattern)):
        return None
    return list(islice(braceexpand(pattern), MOST + 1))


def _expand(pattern: str) -> Iterable[str]:
    check_secrets(pattern)
    if os.path.exists(pattern):  # a name may contain braces
        return [pattern]
    try:
        paths = expand_braces(pattern)
    except ValueError as error:
        raise InputError(
            f"{pattern} has unbalanced braces; write {{000..009}} or {{a,b}}."
        ) from error
    if paths is None or len(paths) > MOST:
        raise InputError(f"{pattern} names more than {MOST} files; use a shorter range.")
    for path in paths:
        check_address(path)
    return [found for path in paths for found in (_glob(path) if "*" in path else [path])]


def _glob(pattern: str) -> list[str]:
    fs, path = filesystem(pattern)
    try:
        found = sorted(retry(pattern, lambda: fs.glob(path)))
    except (FileNotFoundError, NotADirectoryError, NotImplementedError) as error:
        raise InputError(
            f"{pattern} cannot be searched ({error}); use a range such as {{000..009}}."
        ) from error
    if not found:
        raise InputError(
            f"{pattern} matches nothing; check it, or use a range such as {{000..009}}."
        )
    return [fs.unstrip_protocol(path) if "://" in pattern else path for path in found]


def _chosen(folder: str, names: list[str]) -> list[Shard]:
    shards = read_index(folder)
    if ALL in names:
        return shards
    by_name = {shard.name: shard for shard in shards}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(
            f"{folder} has no {missing[0]} in its index; check the pattern, or make the index "
            f"again with `lit-prefopt shards index --folder {folder}`."
        )
    return [by_name[name] for name in dict.fromkeys(names)]
