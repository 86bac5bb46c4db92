"""Prompt files and published prompt sets for evaluation and generation."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from lit_prefopt.errors import check_number
from lit_prefopt.prompts.base import PromptEntry, Prompts
from lit_prefopt.prompts.readers import read_entries

_HPSV2 = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark"
_SHEET = "https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY"
SETS = {
    "partiprompts": [
        "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
    ],
    "geneval": [
        "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
    ],
    "drawbench": [f"{_SHEET}/gviz/tq?tqx=out:csv#drawbench.csv"],
    "hpsv2": [f"{_HPSV2}/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")],
}
"""Published prompt sets by their short names; downloaded from their authors' repositories."""


class PromptFile(Prompts):
    """Prompts from a file, from pair shards, or from a published set.

    The file extension sets the format. A .txt file has one prompt per line; .csv and .tsv files
    a column of prompts; .jsonl files one mapping per line; .json files a list of texts or of
    mappings, a mapping from prompts to their metadata, or a mapping from categories to lists of
    prompts. Anything else is a folder of pair shards. Duplicates are kept, empty prompts skipped.

    Args:
        path: The file, in UTF-8, or the pair shards as `--data.shards` takes them; a local path
            or a URL (append `#a.csv` if it has no file extension); `partiprompts`, `drawbench`,
            `geneval` or `hpsv2` for the published set; or a list of these. With several files,
            each file without categories is a category of its own.
        column: The key or column of the prompts; by default the one named prompt, caption,
            original_prompt, text, txt or prompts (case-insensitive).
        count: Number of prompts, from the first one on; by default all.
        category: The key or column of the categories, for results per category; by default the
            first of category, tag and style that exists.
    """

    def __init__(
        self,
        path: str | list[str],
        column: str | None = None,
        count: int | None = None,
        category: str | None = None,
    ) -> None:
        check_number("count", count, 1, optional=True)
        self.path, self.column, self.count, self.category = path, column, count, category

    @property
    def sources(self) -> list[str]:
        """The files."""
        named = [self.path] if isinstance(self.path, str) else self.path
        known = [SETS.get(name.lower()) if not os.path.exists(name) else None for name in named]
        pairs = zip(named, known, strict=True)
        return [source for name, published in pairs for source in published or [name]]

    def texts(self) -> list[str]:
        """Return the prompts that are not empty."""
        return [entry.text for entry in self.entries()]

    def entries(self) -> list[PromptEntry]:
        """Return the prompts that are not empty, with their categories."""
        sources = self.sources
        found: list[PromptEntry] = []
        for source in sources:
            own = read_entries(source, self.column, self.count, self.category)
            stem = PurePosixPath(source).stem if len(sources) > 1 else None
            found += [entry._replace(category=entry.category or stem) for entry in own]
        return found[: self.count]
