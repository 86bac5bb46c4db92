"""Messages of the parser: one line that names what is wrong and the nearest right name."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def explain(message: str, parser: ArgumentParser) -> str:
    """Return a message of jsonargparse in one line.

    Args:
        message: What jsonargparse says.
        parser: The parser that says it.
    """
    return " ".join(message.split())
