"""The table of help pages: kept in the user's cache, under a name that says what it was made of."""

from __future__ import annotations

import hashlib
import json
import os
import site
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_prefopt.command_line.pages import Option, Page, options_of
from lit_prefopt.configs import BASE, CONFIGS, PREDICT
from lit_prefopt.lazy import PACKAGE
from lit_prefopt.utils.atomic_files import write_atomic

KEPT = 4  # tables of other versions or environments that stay


class Table:
    """Help pages of commands and classes.

    Args:
        commands: The page of each command.
        helps: The page of each `--KEY.help CLASS`, by `KEY CLASS`.
        classes: The page of each class by its import path, arguments named `--x.NAME`; None where
            the parser takes other arguments for it too.
    """

    def __init__(
        self, commands: dict[str, Page], helps: dict[str, Page], classes: dict[str, Page | None]
    ) -> None:
        self.commands, self.helps, self.classes = commands, helps, classes

    def options(self, command: str) -> dict[str, Option]:
        """Return the arguments of a command by name."""
        return options_of(self.commands[command])

    def arguments(self, path: str) -> dict[str, Option] | None:
        """Return the arguments of a class by name, None where they are not known."""
        page = self.classes.get(path)
        return None if page is None else options_of(page, "x.")

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Return the import paths of the classes by their short names."""
        found: dict[str, list[str]] = {}
        for path in self.classes:
            found.setdefault(path.rsplit(".", 1)[-1], []).append(path)
        return found


def table_path() -> Path:
    """Return the file of the table for this package in this environment.

    Its name is a hash of the package's sources, the installed distributions and the interpreter.
    The folders of distributions are those of the environment, not `sys.path`: libraries append to
    it while they are imported (setuptools its own vendored distributions).
    """
    digest = hashlib.blake2s(f"{sys.version} {PACKAGE} {CONFIGS}".encode())
    for file in [*sorted(PACKAGE.rglob("*.py")), BASE, PREDICT]:
        digest.update(file.read_bytes())
    folders = [*site.getsitepackages(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for folder in filter(os.path.isdir, folders):
        installed = sorted(name for name in os.listdir(folder) if name.endswith("-info"))
        digest.update(" ".join(installed).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lit-prefopt" / f"help-{digest.hexdigest()[:20]}.json"


def load_table() -> Table | None:
    """Return the table of this package in this environment, None where there is none yet."""
    try:
        stored: dict[str, Any] = json.loads(table_path().read_text(encoding="utf-8"))
        return Table(**stored)
    except (OSError, ValueError, TypeError):  # not there, or not whole
        return None


def store_table(table: Table) -> None:
    """Write a table where `load_table` finds it; tables of other versions make room.

    Args:
        table: The table of this package in this environment.

    Raises:
        OSError: The cache cannot be written.
    """
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"commands": table.commands, "helps": table.helps, "classes": table.classes}
    write_atomic(path, json.dumps(parts))
    others = [other for other in path.parent.glob("help-*.json") if other != path]
    for other in sorted(others, key=lambda file: file.stat().st_mtime)[:-KEPT]:
        other.unlink(missing_ok=True)
