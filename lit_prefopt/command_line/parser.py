"""What the parsers of all commands share: errors of one line, and help pages that are recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser

from lit_prefopt.command_line.messages import explain
from lit_prefopt.command_line.recording import RECORDED, RecordingFormatter
from lit_prefopt.errors import TRACE
from lit_prefopt.recipe_strings import RecipeFile


class PlainParser(ArgumentParser):
    """Parser that reports an error in one line, with the nearest name, and ends with exit code 2.

    With LIT_PREFOPT_TRACE set, the whole message of jsonargparse is printed.
    """

    files: ClassVar[Sequence[RecipeFile]] = ()  # of the recipe that is parsed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "lit-prefopt", **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and how to write it."""
        if os.environ.get(TRACE) or not self.exit_on_error:  # the parser of a class inside another
            super().error(message, ex)
        self.exit(2, f"lit-prefopt: {explain(message, self, self.files)}\n")

    def format_help(self, *args: Any) -> str:
        """Return the help page, as text or as data."""
        if RECORDED.get():
            self.formatter_class = RecordingFormatter
        return super().format_help(*args)
