"""Record the help pages of a jsonargparse parser as data."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lit_prefopt.command_line.pages import Page

RECORDED: ContextVar[bool] = ContextVar("RECORDED", default=False)
"""Whether parsers write their help pages as JSON."""


class RecordingFormatter(DefaultHelpFormatter):
    """Formats a help page as JSON, with the texts that jsonargparse makes of each argument."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog, *args, **kwargs)
        self.page: Page = []

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *_: Any, **__: Any
    ) -> None:
        """Record the usage line, which leaves out the options that print something and exit."""
        shown = [
            [
                action.option_strings[0],
                self._format_args(action, self._get_default_metavar_for_optional(action)),
                action.required,
                action.nargs == 0,
            ]
            for action in actions
            if action.option_strings
            and action.help != argparse.SUPPRESS
            and not action.option_strings[0].endswith((".help", "-h", "--print_config"))
        ]
        self.page.append(["usage", self._prog, shown])

    def add_text(self, text: str | None) -> None:
        """Record a text."""
        if text is not None and text != argparse.SUPPRESS:
            self.page.append(["text", text])

    def start_section(self, heading: str | None) -> None:
        """Record the beginning of a section."""
        self.page.append(["section", heading])

    def end_section(self) -> None:
        """Record the end of a section."""
        self.page.append(["end"])

    def add_argument(self, action: argparse.Action) -> None:
        """Record an argument."""
        if action.help != argparse.SUPPRESS:
            text = self._expand_help(action)
            self.page.append(["argument", self._format_action_invocation(action), text])

    def format_help(self) -> str:
        """Return what was recorded as JSON."""
        return json.dumps(self.page)


def class_page(kind: type, parser_class: type[ArgumentParser]) -> Page:
    """Return the help page of a class, its arguments named `--x.NAME`.

    Args:
        kind: The class.
        parser_class: The parser that reads its arguments.
    """
    parser = parser_class(formatter_class=RecordingFormatter)
    parser.add_class_arguments(kind, "x", fail_untyped=False)
    page: Page = json.loads(parser.format_help())
    return page


def printed_page(parser: ArgumentParser, args: Sequence[str]) -> Page:
    """Return the help page that a parser prints for these arguments before it exits.

    Args:
        parser: The parser.
        args: Arguments with a `--help` or `--KEY.help CLASS`.
    """
    printed, errors = io.StringIO(), io.StringIO()
    with _recorded(), redirect_stdout(printed), redirect_stderr(errors):
        try:
            parser.parse_args([*args])
        except SystemExit as stop:
            if stop.code:
                text = f"no help page for {' '.join(args)}: {errors.getvalue()}"
                raise RuntimeError(text) from stop
    page: Page = json.loads(printed.getvalue().splitlines()[-1])  # imports may print before it
    return page


@contextmanager
def _recorded() -> Iterator[None]:
    token = RECORDED.set(True)
    try:
        yield
    finally:
        RECORDED.reset(token)
