"""Answer a command without torch where the table of help pages suffices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lit_prefopt.command_line.keys import check_keys
from lit_prefopt.command_line.pages import Page, write_page
from lit_prefopt.command_line.table import Table, load_table, store_table


def answer(args: Sequence[str], write_table: Callable[[], Table]) -> bool:
    """Print a help page, or refuse a key that does not exist; return whether nothing is left to do.

    Where there is no table yet, the first help page writes it, which imports everything once.

    Args:
        args: One of the Trainer's commands and its arguments, names of recipes resolved to paths.
        write_table: Records the help pages of the real parser.

    Raises:
        UsageError: A key or class does not exist.
    """
    if "torch" in sys.modules:  # what the parser needs is imported, and classes of others may be
        return False
    table = load_table()
    if _is_help(args):
        page = _find_page(args, table or _new_table(write_table))
        if page is not None:
            print(write_page(page), end="")
        return page is not None
    if table is not None:
        check_keys(args, table)
    return False


def _is_help(args: Sequence[str]) -> bool:
    """Return whether a command requests one help page and nothing else."""
    if len(args) == 2:
        return args[1] in ("-h", "--help") or ".help=" in args[1]
    return len(args) == 3 and args[1].startswith("--") and args[1].endswith(".help")


def _find_page(args: Sequence[str], table: Table) -> Page | None:
    if args[1] in ("-h", "--help"):
        return table.commands[args[0]]
    key, name = args[1].split("=", 1) if len(args) == 2 else args[1:]
    key = key.removeprefix("--").removesuffix(".help")
    paths = [name] if "." in name else table.by_name.get(name, [])
    pages = [table.helps[f"{key} {path}"] for path in paths if f"{key} {path}" in table.helps]
    return pages[0] if len(pages) == 1 else None


def _new_table(write_table: Callable[[], Table]) -> Table:
    print("Reading the arguments of all classes, once for this installation ...", file=sys.stderr)
    table = write_table()
    try:
        store_table(table)
    except OSError as error:
        print(f"They cannot be kept for the next time ({error}).", file=sys.stderr)
    return table
