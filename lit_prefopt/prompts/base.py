"""A list of prompts, with their categories and their digest."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple


class PromptEntry(NamedTuple):
    """One prompt of a set."""

    text: str
    category: str | None = None


class Prompts(ABC):
    """A list of prompts."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Return the prompts in a fixed order."""

    def entries(self) -> list[PromptEntry]:
        """Return the prompts with their categories, in the same order; by default without any."""
        return [PromptEntry(text) for text in self.texts()]


def digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of prompts, equal to that of a .txt file with one prompt per line."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(f"{text}\n".encode())
    return whole.hexdigest()
