"""Help pages as data: printed at the width of the terminal without the parser that they describe.

A page is a list of rows, in the order of the calls of `argparse.HelpFormatter`: a usage line,
texts, sections, arguments.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, NamedTuple

Page = list[list[Any]]
NAMED = re.compile(r"--([\w.]+)")
KNOWN = re.compile(r"known subclasses: ([\w., \n]*)")


class Option(NamedTuple):
    """An argument of a page.

    Args:
        classes: Import paths of the classes that it takes.
        pure: Whether it takes a class, a file with one, or nothing else.
    """

    classes: tuple[str, ...]
    pure: bool


class _Argument(argparse.Action):
    """An argument whose texts were formatted before."""

    def __init__(self, invocation: str, text: str | None) -> None:
        super().__init__([], "", help=text)
        self.invocation = invocation

    def __call__(self, *_: Any) -> None:
        """Do nothing: a page is printed and parses no arguments."""


class _InUsage(_Argument):
    """An option of the usage line."""

    def __init__(self, option: str, values: str, required: bool, flag: bool) -> None:
        super().__init__("", "")
        self.option_strings, self.values, self.required = [option], values, required
        self.nargs = 0 if flag else None


class _Formatter(argparse.HelpFormatter):
    """Formats pages."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.values if isinstance(action, _InUsage) else ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.invocation if isinstance(action, _Argument) else ""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""


def write_page(page: Page) -> str:
    """Return a page as text, at the width of the terminal.

    Args:
        page: What `recording` recorded.
    """
    formatter = _Formatter(str(page[0][1]))
    for kind, *values in page:
        if kind == "usage":
            formatter.add_usage(None, [_InUsage(*option) for option in values[1]], [])
        elif kind == "text":
            formatter.add_text(values[0])
        elif kind == "section":
            formatter.start_section(values[0])
        elif kind == "end":
            formatter.end_section()
        else:
            formatter.add_argument(_Argument(*values))
    return formatter.format_help()


def options_of(page: Page, prefix: str = "") -> dict[str, Option]:
    """Return the arguments of a page by name, without dashes.

    Args:
        page: The page of a command or a class.
        prefix: What the names begin with and are returned without, such as `model.`.
    """
    found: dict[str, Option] = {}
    for kind, *values in page:
        if kind != "argument":
            continue
        invocation, text = values
        known = KNOWN.search(text or "")
        classes = tuple(re.findall(r"[\w.]+", known[1])) if known else ()
        for name in NAMED.findall(invocation):
            if name.startswith(prefix):
                pure = "CLASS_PATH_OR_NAME |" in invocation
                found[name.removeprefix(prefix)] = Option(classes, pure)
    return found
