"""Report a full disk as an input error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_prefopt.errors import InputError


@contextmanager
def explain_full_disk(output: str) -> Iterator[None]:
    """Raise InputError for write errors such as a full disk; the writer removes partial files.

    Args:
        output: The path that is written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}); free disk space or choose "
            "another folder. Partial files were removed."
        ) from error
