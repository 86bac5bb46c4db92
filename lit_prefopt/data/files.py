"""One door to files, local or remote, that never runs a command."""

from __future__ import annotations

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lit_prefopt.errors import InputError


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path inside of it."""
    if url.startswith("pipe:"):
        raise InputError(f"{url} would run a command; copy the shards to a folder and name that.")
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        text = str(error).rstrip(".")
        raise InputError(f"{url} cannot be opened ({text}); give a folder or a URL.") from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether the file system is this machine's own."""
    return isinstance(fs, LocalFileSystem)
