"""Where the prompts of an evaluation come from."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lit_prefopt.errors import check_number


class Prompts(ABC):
    """A list of prompts."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Return the prompts in a fixed order."""


class PromptFile(Prompts):
    """Prompts from a file whose ending says what it is, or from pair shards.

    A .txt file holds one prompt a line; .csv and .tsv files have a column of them; .jsonl files a
    mapping a line; .json files a list of texts or of mappings, or one mapping from each prompt to
    its facts. Anything else is a folder of pair shards. What occurs twice stays twice, what is
    empty is left out.

    Args:
        path: The file, in UTF-8, or the pair shards as `--data.shards` takes them; a local path
            or a URL.
        column: The key or column that holds the prompts; where not given, the one that is called
            prompt, caption, original_prompt, text or txt, in capitals or not.
        count: How many of its first prompts to take; all where it is not given.
    """

    def __init__(self, path: str, column: str | None = None, count: int | None = None) -> None:
        check_number("count", count, 1)
        self.path, self.column, self.count = path, column, count

    def texts(self) -> list[str]:
        """Return the prompts that are not empty."""
        # here, because the readers import the data package, and that imports this file
        from lit_prefopt.intake.prompts import read_prompts

        return read_prompts(self.path, self.column, self.count)
