"""Collect the strings of a recipe: what its files and arguments name, read before any parsing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_prefopt.configs import CONFIGS

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = (".yaml", ".yml", ".json")


class RecipeFile(NamedTuple):
    """A file of a recipe: its path and what it holds."""

    path: Path
    content: Any


def read_recipe(args: Sequence[str], defaults: Sequence[Path] = ()) -> list[RecipeFile]:
    """Return the files of a recipe: those that arguments name, and those named inside them.

    A file that cannot be read or parsed holds None: the parser reports it.

    Args:
        args: Arguments of a command, names of shipped recipes resolved to paths.
        defaults: Files that the command reads before its arguments.
    """
    found: dict[Path, RecipeFile] = {}
    waiting = [*defaults, *(path for arg in args for path in _files_in(arg, Path()))]
    while waiting:
        path = waiting.pop(0).resolve()
        if path in found:
            continue
        content = read_yaml(path)
        found[path] = RecipeFile(path, content)
        for text in strings(content):
            waiting += _files_in(text, path.parent)
    return list(found.values())


def strings(value: Any) -> Iterator[str]:
    """Yield the strings of a parsed YAML value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def words(args: Sequence[str], files: Sequence[RecipeFile]) -> set[str]:
    """Return every word that could be the name of a class.

    Args:
        args: Arguments of a command.
        files: The files that they name.
    """
    texts = [*args, *(text for file in files for text in strings(file.content))]
    return {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}


def _files_in(text: str, folder: Path) -> list[Path]:
    """Return the files that a string may mean, in a folder or among the shipped parts."""
    name = text.split("=", 1)[-1] if text.startswith("--") else text
    if not name.endswith(FILES):
        return []
    places = [folder / name, Path(name), CONFIGS / name.removeprefix("configs/")]
    return [path for path in places if path.is_file()]


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; None where it cannot be read or parsed."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
