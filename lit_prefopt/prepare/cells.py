"""Parse the cells of a row: images, numbers, and lists that a table stores as text."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import os
import re
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from lit_prefopt.errors import QUOTED, quoted, shortened
from lit_prefopt.prepare.source_rows import MAX_BYTES, BrokenRecord

BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR")  # of JPEG, PNG and WebP
NAME_MAX = 255  # characters of a file name; an encoded image is longer
LONGEST_LIST = 100_000  # characters of a list in a cell
LARGEST = 1e300  # of a number; the difference of two larger ones could overflow
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")  # 1,234: a thousand or a decimal comma?


class ImageSource(NamedTuple):
    """One image of a source, by path or by bytes."""

    name: str  # for messages
    path: Path | None  # the file, if the bytes are not in `data`
    data: bytes = b""


def image_source(cell: Any, name: str, folder: Path) -> ImageSource:
    """Parse the cell of an image: a path, bytes, base64, or a mapping with bytes and path.

    Args:
        cell: The cell.
        name: Name of an image without a path, for messages.
        folder: Base folder of relative paths.
    """
    if isinstance(cell, dict):  # the datasets library's format of an image
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return ImageSource(name, None, cell)
    if not isinstance(cell, str) or not cell:
        raise BrokenRecord(f"has neither a path nor bytes for an image ({name})")
    embedded = _from_base64(cell, name)
    if embedded is not None:
        return ImageSource(name, None, embedded)
    if not _nameable(cell):
        raise BrokenRecord(f"has neither a path nor bytes for an image ({name})")
    if "://" in cell:
        raise BrokenRecord(f"has the remote image {quoted(cell)}; download it first")
    return ImageSource(_path_name(folder, cell), folder / cell)


def list_of_cells(cell: Any) -> list[Any] | None:
    """Return a list, also one that a table stores as JSON or as separated text; otherwise None."""
    if isinstance(cell, list | tuple):
        return list(cell)
    if not isinstance(cell, str) or len(cell) > LONGEST_LIST:
        return None
    text = cell.strip()
    if text[:1] in ("[", "("):
        for parse in (json.loads, ast.literal_eval):
            try:
                values = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(values, list | tuple):
                return list(values)
        text = text[1:-1]
    for separator in ("|", ";", ","):
        if separator in text:
            return [part.strip() for part in text.split(separator)]
    return None


def parse_numbers(cell: Any, count: int, name: str) -> list[float]:
    """Return one finite number per image, or an empty list for None.

    Args:
        cell: A list of numbers, or its text.
        count: Number of images.
        name: Name of the column, for messages.
    """
    if cell is None:
        return []
    values = list_of_cells(cell)
    if values is None:
        values = cell.strip(" []").split() if isinstance(cell, str) else [cell]
    found = [parse_number(value) for value in values]
    finite = [value for value in found if value is not None and isfinite(value)]
    if len(finite) != count or len(found) != count:
        raise BrokenRecord(f"does not have one number for each of {count} images under {name}")
    return finite


def parse_number(value: Any) -> float | None:
    """Parse a number, also a decimal or the text of a table; return None for anything else."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        if THOUSANDS.fullmatch(value.strip()):
            return None
        value = value.replace(",", ".") if value.count(",") == 1 else value  # a decimal comma
    if isinstance(value, str | Decimal):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or abs(value) > LARGEST:
        return None
    return value


def truth(value: Any) -> bool:
    """Return whether a cell is true; an absent one is."""
    return value is None or str(value).strip().lower() not in ("false", "0", "0.0", "no")


def _from_base64(cell: str, name: str) -> bytes | None:
    """Return the bytes of an image that is stored as base64 or as a data: URL, else None."""
    head, _, body = cell.partition(",") if cell.startswith("data:") else ("", "", cell)
    # a path has dots, or is shorter
    looks = len(body) > NAME_MAX or (len(body) > 64 and body.startswith(BASE64_STARTS))
    if not head and not looks:
        return None
    if len(body) > 2 * MAX_BYTES:
        raise BrokenRecord(f"has an image of {len(body)} characters of text ({name})")
    body = "".join(body.split())
    if not BASE64.fullmatch(body):
        if head or body.startswith(BASE64_STARTS):
            raise BrokenRecord(f"has an image that is not valid base64 ({name})")
        return None
    body = body.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except binascii.Error as error:
        raise BrokenRecord(f"has an image that is not valid base64 ({name})") from error


def _path_name(folder: Path, cell: str) -> str:
    return str(folder / cell) if len(cell) <= NAME_MAX else str(folder / shortened(cell, QUOTED))


def _nameable(path: str) -> bool:
    """Return whether a path is a valid file name."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
