"""Read pairs from a folder with chosen/ and rejected/, matched by file name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lit_prefopt.data.shards.format import EXTENSIONS, SIDES
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource

TEXTS = (*SIDES, "prompts", "txt")  # folders searched for NAME.txt, in this order


def pair_folder(folder: Path) -> RecordSource:
    """Return the pairs chosen/NAME.png and rejected/NAME.png, with the text of NAME.txt.

    The text file is beside either image, in prompts/ or in txt/.
    """
    sides = {side: _images(folder / side) for side in SIDES}
    names = sorted(set().union(*sides.values()))
    return RecordSource(_rows(folder, names, sides), len(names))


def is_pair_folder(folder: Path) -> bool:
    """Return whether a folder has the subfolders chosen/ and rejected/."""
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
            yield RawRecord(where, {}, folder, f"has more than one {several[0]} image")
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
