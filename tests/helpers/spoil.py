"""Spoil bytes and values at random."""

from __future__ import annotations

import random
from typing import Any

STRANGE: list[Any] = [
    *[None, True, False, -1, 0, 2**63, 10**400, 0.5, float("nan"), float("inf")],
    *["", " ", "\0", "é" * 3000, "x" * 100_000, "a\nb", '"', "'", "[/bold]", "\ud800", "\ufeff"],
    *[[], {}, [[]], {"bytes": None}, {"path": []}, {"bytes": "x"}, [None] * 50, {"chosen": 1}],
]
ODD_PATHS = [
    *["nothing", "../..", "pipe", "/dev/zero", "/dev/full", "/etc", "/proc/self/mem", "~"],
    *["x" * 300, "x/" * 3000, "[a-", "{0..9"],
    *["https://", "http://[", "s3://a b", "pipe:ls", "file:///etc/passwd", "a::b"],
]


def spoil_value(record: dict[str, Any], draws: random.Random) -> Any:
    """Return a copy of a record with one value or key changed, or something else in its place."""
    way = draws.randrange(5)
    key = draws.choice(list(record))
    changed: Any = dict(record)
    if way == 0:
        del changed[key]
    elif way == 1:
        changed[key] = draws.choice(ODD_PATHS)
    elif way == 2 and draws.random() < 0.3:
        changed = draws.choice(STRANGE)
    else:
        changed[key] = draws.choice(STRANGE)
    return changed


def spoil_bytes(data: bytes, draws: random.Random) -> bytes:
    """Return bytes of which some are changed, cut, doubled, moved or put in."""
    way, at = draws.randrange(7), draws.randrange(len(data) + 1)
    until = min(len(data), at + draws.choice([1, 4, 30, 512, 5000]))
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + data[until:]
    if way == 2:
        return data[:until] + data[at:until] + data[until:]
    if way == 3:
        return data[at:] + data[:at]
    if way == 4:
        return data[:at] + draws.randbytes(until - at) + data[until:]
    if way == 5:
        odd = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"[" * 5000, b"9" * 5000, b"\\u"]
        return data[:at] + draws.choice(odd) + data[at:]
    changed = bytearray(data)
    for _ in range(draws.choice([1, 1, 3, 20]) if data else 0):
        changed[draws.randrange(len(changed))] = draws.randrange(256)
    return bytes(changed)
