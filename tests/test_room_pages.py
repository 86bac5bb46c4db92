"""The README.md of each room names the room's files and classes that exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_prefopt"
PAGES = sorted(PACKAGE.rglob("README.md"))
NAMES = r"([\w/]+\.py): (\w+(?:, \w+\b(?!/|\.py))*)"  # file.py: name, name, other/file.py
LARGE = 5  # files of a room that need no page


def named_files(page: Path) -> set[str]:
    """Return the Python files that a page names, as paths from its room or from the package."""
    return set(re.findall(r"[\w/]+\.py\b", page.read_text()))


@functools.cache
def definitions(path: Path) -> set[str]:
    """Return the names of a file's classes and functions."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def all_definitions() -> set[str]:
    """Return the names of all classes and functions of the package."""
    return set().union(*map(definitions, PACKAGE.rglob("*.py")))


def test_every_large_room_has_a_page() -> None:
    rooms = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    large = {room for room in rooms if len([*room.glob("*.py")]) > LARGE + 1}  # and __init__.py
    assert large
    assert large <= {page.parent for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(PACKAGE)))
def test_a_page_names_what_exists(page: Path) -> None:
    room, named = page.parent, named_files(page)
    lost = [name for name in named if not any((top / name).is_file() for top in (room, PACKAGE))]
    assert not lost, f"{page} names files that do not exist: {lost}"
    own = {path.name for path in room.glob("*.py")} - {"__init__.py"}
    assert own <= named, f"{page} does not name {sorted(own - named)}"
    for name, text in re.findall(NAMES, page.read_text()):
        [file] = [top / name for top in (room, PACKAGE) if (top / name).is_file()]
        wrong = set(text.split(", ")) - definitions(file)
        assert not wrong, f"{page}: {name} does not define {sorted(wrong)}"
    classes = set(re.findall(r"`([A-Z][a-z]\w*[A-Z]\w*)`", page.read_text()))
    unknown = classes - all_definitions() - {"EarlyStopping", "ModelCheckpoint"}  # of Lightning
    assert not unknown, f"{page}: {sorted(unknown)}"
