"""Corruptions of a prompt for the right panel of a diptych: misspelt text, swapped words."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import ascii_lowercase, digits
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Generator

from lit_prefopt.errors import InputError

Misspelling = Literal["swap", "replace", "drop", "double"]
Thing = TypeVar("Thing")

_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|„([^“]+)“|(?<!\w)['‘]([^'’]+)['’](?!\w)")


class CorruptionTarget(NamedTuple):
    """What differs between the two panels."""

    kind: str  # "text", "word" or the name of an attribute
    left: str  # its value in the left panel
    right: str  # its value in the right panel


class CorruptedPrompt(NamedTuple):
    """The prompts of both panels."""

    left: str  # the original prompt
    right: str  # the corrupted prompt
    target: CorruptionTarget


class Corruption(ABC):
    """Corrupts one detail of a prompt by a rule."""

    WANTS: ClassVar[str]
    """What a prompt needs in order to be corrupted, for messages."""

    @abstractmethod
    def corrupt(self, prompt: str, generator: Generator) -> CorruptedPrompt | None:
        """Return the prompts of both panels, or None if there is nothing to corrupt.

        Args:
            prompt: Any prompt.
            generator: Random generator.
        """


class MisspeltText(Corruption):
    """Misspells one word of a text in quotes.

    Args:
        kinds: Kinds of misspelling: `swap` two neighbouring letters, `replace` one, `drop` one,
            `double` one.
    """

    WANTS = "a text in quotes"

    def __init__(
        self, kinds: tuple[Misspelling, ...] = ("swap", "replace", "drop", "double")
    ) -> None:
        unknown = set(kinds) - set(_WAYS)
        if unknown or not kinds:
            raise InputError(
                f"The kinds of misspelling are {', '.join(kinds) or 'none'}; choose from "
                f"{', '.join(_WAYS)}."
            )
        self.kinds = tuple(kinds)

    def corrupt(self, prompt: str, generator: Generator) -> CorruptedPrompt | None:
        """Return the prompt, and a copy with a misspelt word in quotes."""
        for quoted in _shuffled([*_QUOTED.finditer(prompt)], generator):
            group = quoted.lastindex or 0
            text, start = quoted.group(group), quoted.start(group)
            for word in _shuffled([*re.finditer(r"[^\W_]+", text)], generator):
                wrong = self._misspelt(word.group(), generator)
                if wrong is not None:
                    other = text[: word.start()] + wrong + text[word.end() :]
                    spoilt = prompt[:start] + other + prompt[quoted.end(group) :]
                    return CorruptedPrompt(prompt, spoilt, CorruptionTarget("text", text, other))
        return None

    def _misspelt(self, word: str, generator: Generator) -> str | None:
        """Return a misspelling, or None if there is none."""
        for kind in _shuffled(self.kinds, generator):
            for place in _shuffled(range(len(word)), generator):
                wrong = _WAYS[kind](word, place, generator)
                # a change of case alone is not a misspelling
                if wrong and wrong.casefold() != word.casefold():
                    return wrong
        return None


class WordSwap(Corruption):
    """Replaces one word by another from a table.

    Args:
        words: Replacements of each word, such as `{left: [right], three: [two, four]}`.
    """

    WANTS = "a word of the table"

    def __init__(self, words: Mapping[str, list[str]]) -> None:
        self.words = {word.casefold(): [*others] for word, others in words.items()}
        empty = [
            w for w, others in self.words.items() if not others or w in map(str.casefold, others)
        ]
        if not self.words or empty:
            raise InputError(
                f"The table `words` has no replacement for {', '.join(empty) or 'any word'}; give "
                "at least one for each."
            )

    def corrupt(self, prompt: str, generator: Generator) -> CorruptedPrompt | None:
        """Return the prompt, and a copy with one word replaced."""
        words = sorted(self.words, key=len, reverse=True)  # longer matches first
        known = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
        found = [*known.finditer(prompt)]
        if not found:
            return None
        word = choose_one(found, generator)
        other = choose_one(self.words[word.group().casefold()], generator)
        if word.group()[0].isupper():
            other = other[0].upper() + other[1:]
        spoilt = prompt[: word.start()] + other + prompt[word.end() :]
        return CorruptedPrompt(prompt, spoilt, CorruptionTarget("word", word.group(), other))


def choose_one(things: Sequence[Thing], generator: Generator) -> Thing:
    """Return one item, drawn uniformly."""
    return things[int(torch.randint(len(things), (), generator=generator))]


def _shuffled(things: Sequence[Thing], generator: Generator) -> Iterator[Thing]:
    return (things[i] for i in torch.randperm(len(things), generator=generator).tolist())


def _swap(word: str, place: int, generator: Generator) -> str:
    return word[:place] + word[place : place + 2][::-1] + word[place + 2 :]


def _replace(word: str, place: int, generator: Generator) -> str:
    old = word[place]
    choice = digits if old.isdigit() else ascii_lowercase
    new = choose_one([letter for letter in choice if letter != old.casefold()], generator)
    return word[:place] + (new.upper() if old.isupper() else new) + word[place + 1 :]


def _drop(word: str, place: int, generator: Generator) -> str:
    return word[:place] + word[place + 1 :]


def _double(word: str, place: int, generator: Generator) -> str:
    return word[:place] + word[place] + word[place:]


_WAYS: dict[str, Callable[[str, int, Generator], str]] = {
    "swap": _swap,
    "replace": _replace,
    "drop": _drop,
    "double": _double,
}
