"""Where the prompts of an evaluation come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from lit_prefopt.errors import InputError, check_number


class Prompts(ABC):
    """A list of prompts."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Return the prompts in a fixed order."""


class PromptFile(Prompts):
    """Prompts from a text file, one a line.

    Args:
        path: The file, in UTF-8.
        count: How many of its first prompts to take; all where it is not given.
    """

    def __init__(self, path: str, count: int | None = None) -> None:
        check_number("count", count, 1)
        self.path, self.count = path, count

    def texts(self) -> list[str]:
        """Return the lines that are not empty."""
        try:
            lines = [line.strip() for line in Path(self.path).read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path} cannot be read as UTF-8 text ({error}); name a file of prompts."
            ) from error
        texts = [line for line in lines if line][: self.count]
        if not texts:
            raise InputError(f"{self.path} holds no prompt; write one a line.")
        return texts
