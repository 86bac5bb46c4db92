"""A folder with chosen/ and rejected/: the pairs are what has the same name in both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lit_prefopt.data.shards.format import EXTENSIONS, SIDES
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource

TEXTS = (*SIDES, "prompts", "txt")  # where NAME.txt is looked for, in this order


def pair_folder(folder: Path) -> RecordSource:
    """Return the pairs chosen/NAME.png and rejected/NAME.png, with the text of NAME.txt.

    The text lies beside either image, in prompts/ or in txt/.
    """
    sides = {side: _images(folder / side) for side in SIDES}
    names = sorted(set().union(*sides.values()))
    return RecordSource(_rows(folder, names, sides), len(names))


def is_pair_folder(folder: Path) -> bool:
    """Return whether a folder is such a one."""
    return all((folder / side).is_dir() for side in SIDES)


def _images(folder: Path) -> dict[str, list[str]]:
    images = defaultdict[str, list[str]](list)
    for path in folder.iterdir():
        if path.suffix.lower().removeprefix(".") in EXTENSIONS:
            images[path.stem].append(path.name)
    return images


def _rows(
    folder: Path, names: list[str], sides: dict[str, dict[str, list[str]]]
) -> Iterator[RawRecord]:
    for name in names:
        where = f"{folder}/{name}"
        found = {side: sides[side].get(name, []) for side in SIDES}
        several = [side for side in SIDES if len(found[side]) > 1]
        if several:
            yield RawRecord(where, {}, folder, f"has several {several[0]} images")
            continue
        values = {side: f"{side}/{files[0]}" for side, files in found.items() if files}
        text = _text(folder, name)
        yield RawRecord(where, values if text is None else {**values, "prompt": text}, folder)


def _text(folder: Path, name: str) -> str | None:
    for place in TEXTS:
        path = folder / place / f"{name}.txt"
        if path.is_file():
            return path.read_text("utf-8-sig", errors="surrogateescape")
    return None
