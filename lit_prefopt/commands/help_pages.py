"""Write the table of help pages: record each page of the real parser, for commands and classes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from jsonargparse import ArgumentParser, capture_parser

from lit_prefopt.command_line.pages import Page, options_of
from lit_prefopt.command_line.recording import class_page, printed_page
from lit_prefopt.command_line.table import Table
from lit_prefopt.lazy import class_modules
from lit_prefopt.lightning_cli import Parser, run_lightning

COMMANDS = ("fit", "validate", "test", "predict")
NAMED = ("lit_prefopt.", "lightning.")  # the packages whose classes recipes name


def write_table(only: Iterable[str] | None = None) -> Table:
    """Return the help pages of the Trainer's commands and of the classes that recipes name.

    A class is left out where jsonargparse cannot build its page, and where it is of neither this
    package nor Lightning: an argument that takes any `torch.nn.Module` has thousands of classes.
    The parser itself answers for what is left out.

    Args:
        only: Short names of the classes to record; all by default.
    """
    import_classes()
    kept = None if only is None else set(only)
    parser = capture_parser(lambda: run_lightning(["fit"], every_parser=True))
    commands = {command: printed_page(parser, [command, "--help"]) for command in COMMANDS}
    found = options_of(commands["fit"])
    taken = {
        (key, path)
        for key, option in found.items()
        for path in option.classes
        if f"{key}.help" in found and _is_kept(path, kept)
    }
    helps = {}
    for key, path in sorted(taken):
        try:
            helps[f"{key} {path}"] = printed_page(parser, ["fit", f"--{key}.help", path])
        except Exception:  # such as a type that jsonargparse cannot read
            taken.remove((key, path))
    return Table(commands, helps, _classes({path for _, path in taken}, kept))


def import_classes() -> None:
    """Import every module of the package with a class that recipes name."""
    for module in sorted({home for homes in class_modules().values() for home in homes}):
        importlib.import_module(module)


def _is_kept(path: str, kept: set[str] | None) -> bool:
    named = path.startswith(NAMED)
    return named if kept is None else named and path.rsplit(".", 1)[-1] in kept


def _classes(paths: set[str], kept: set[str] | None) -> dict[str, Page | None]:
    """Return the page of each class, and of the classes that its arguments accept."""
    pages: dict[str, Page | None] = {}
    waiting = sorted(paths)
    while waiting:
        path = waiting.pop()
        if path not in pages:
            page = pages[path] = _class_page(path)
            inner = options_of(page or [])
            waiting += [one for option in inner.values() for one in option.classes]
            waiting = [one for one in waiting if _is_kept(one, kept)]
    return pages


def _class_page(path: str) -> Page | None:
    """Return the page of a class; None if it cannot be built or does not list every argument."""
    module, name = path.rsplit(".", 1)
    try:
        kind = getattr(importlib.import_module(module), name)
        return None if _takes_any(kind) else class_page(kind, Parser)
    except Exception:  # as above
        return None


def _takes_any(kind: type) -> bool:
    """Return whether the parser accepts arguments that the class does not have."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "x", fail_untyped=False)
    spec = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    try:
        parser.parse_object({"x": {**spec, "init_args": {"no_such_argument": 1}}})
    except Exception as error:  # the parser raises many types for a class that it cannot build
        return "no_such_argument" not in str(error)
    return True
