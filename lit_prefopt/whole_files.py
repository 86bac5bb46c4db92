"""Files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, and give it its name at the end."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    file, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def whole_output(path: Path, replace: bool = False) -> Iterator[Path]:
    """Lend a temporary path for a file or folder, which gets its name when the block ends well.

    Args:
        path: The name that it gets.
        replace: Whether something may go by it already, which then gives way at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a sibling, hence on the same file system: the rename at the end is atomic
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        files = [temporary] if temporary.is_file() else temporary.rglob("*")
        for file in files:
            if file.is_file():
                file.chmod(0o644)  # safetensors' files are for their owner alone
        if replace and path.exists():
            os.rename(path, Path(folder) / "before")
        os.rename(temporary, path)
