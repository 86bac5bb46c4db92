"""Lazy imports: a package names its classes and imports the file of each on first use (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports its names on first use.

    The names are those that its `__init__.py` imports under `if TYPE_CHECKING:`, so that editors
    and type checkers see plain imports.

    Args:
        package: The package's `__name__`.
    """
    module = sys.modules[package]
    homes = imported_names(Path(str(module.__file__)))

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *homes})

    return load, names


def imported_names(path: Path) -> dict[str, str]:
    """Return the module of each name that a file imports under `if TYPE_CHECKING:`.

    Args:
        path: An `__init__.py` of the package.
    """
    blocks = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ]
    return {
        alias.asname or alias.name: str(node.module)
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@cache
def class_modules() -> dict[str, list[str]]:
    """Return the modules of the package that define a class, by the class's name.

    They are read from the sources and not imported.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name].append(module)
    return dict(found)


def import_classes(names: set[str]) -> None:
    """Import the modules that define the classes of these names; other names are skipped.

    Args:
        names: Class names without their modules, as recipes give them.
    """
    for name in sorted(names & set(class_modules())):
        for module in class_modules()[name]:
            importlib.import_module(module)
