"""Read pairs from a folder with chosen/ and rejected/, matched by file name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lit_prefopt.data.shards.format import EXTENSIONS, SIDES
from lit_prefopt.prepare.encodings import decode_text
from lit_prefopt.prepare.source_rows import RawRecord, RecordSource, listed

TEXTS = (*SIDES, "prompts", "txt")  # folders searched for NAME.txt, in this order
NO_IMAGES = {".txt", ".text", ".caption", ".json"}  # extensions of what lies beside the images


def pair_folder(folder: Path) -> RecordSource:
    """Return the pairs chosen/NAME.png and rejected/NAME.png, with the text of NAME.txt.

    The text file is beside either image, in prompts/ or in txt/. Images may be in subfolders,
    the same for both sides. Every file that is no text counts as an image, so that files that
    cannot be used are reported.
    """
    sides = {side: _images(folder / side) for side in SIDES}
    names = sorted(set().union(*sides.values()))
    return RecordSource(_rows(folder, names, sides), len(names), _notes(folder, sides))


def is_pair_folder(folder: Path) -> bool:
    """Return whether a folder has the subfolders chosen/ and rejected/."""
    return all(os.path.isdir(folder / side) for side in SIDES)


def _images(folder: Path) -> dict[str, list[str]]:
    """Return the images by name, which is the path below the folder without extension."""
    images = defaultdict[str, list[str]](list)
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        if path.suffix.lower() not in NO_IMAGES and not hidden and not path.is_dir():
            images[below.with_suffix("").as_posix()].append(below.as_posix())
    return images


def _notes(folder: Path, sides: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    """Return a note on the files that are read in spite of their place or extension."""
    files = [Path(name) for found in sides.values() for names in found.values() for name in names]
    odd = {path for path in files if path.suffix.lower().removeprefix(".") not in EXTENSIONS}
    odd |= {path for path in files if len(path.parts) > 1}
    if not odd:
        return ()
    names = listed(sorted(map(str, odd)))
    return (f"{folder}: files in subfolders or with other extensions are read too: {names}",)


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
            return decode_text(path.read_bytes())
    return None
