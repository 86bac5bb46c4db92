"""What a full disk says, as a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_prefopt.errors import InputError


@contextmanager
def explain_full_disk(output: str) -> Iterator[None]:
    """Turn what a full disk says into a sentence; the writer leaves nothing behind.

    Args:
        output: What is being written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}); free some space or name "
            "another folder, nothing was left behind."
        ) from error
