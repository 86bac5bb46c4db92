"""Detect the encoding of texts and tables: UTF-8 with or without a mark, UTF-16 or UTF-32."""

from __future__ import annotations

import json
from pathlib import Path


def decode_text(data: bytes) -> str:
    """Decode a text; bytes that are no text become surrogates, which are reported later."""
    try:
        return data.decode(json.detect_encoding(data[:4]))
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", errors="surrogateescape")


def encoding_of(path: Path) -> str:
    """Return the encoding of a file, by the mark at its start or by the zeros among its letters.

    Args:
        path: A text file that starts with a letter, a digit or a bracket.
    """
    with path.open("rb") as file:
        found = json.detect_encoding(file.read(4))
    return "utf-8-sig" if found == "utf-8" else found
