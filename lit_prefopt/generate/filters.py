"""Filters that decide which diptychs become pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lit_prefopt.data.images import to_pil
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.generate.corruptions import CorruptionTarget
from lit_prefopt.judges import Judge
from lit_prefopt.judges.ocr import rapid_ocr


class Diptych(NamedTuple):
    """Two halves of one canvas."""

    prompt: str  # of the left half
    other: str  # of the right half
    target: CorruptionTarget  # what differs between the two
    left: Tensor  # (3, H, W) in [-1, 1]
    right: Tensor  # (3, H, W) in [-1, 1]
    change: Tensor  # (1, H, W): 1 where they differ


class Filter(ABC):
    """Decides which diptychs are rejected, with a reason."""

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Load what it needs; raise InputError if something is missing."""

    @abstractmethod
    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return the reason why each diptych is rejected (in the plural, for counts), or None.

        Args:
            diptychs: Those that passed all previous filters.
        """


def first_rejections(filters: Sequence[Filter], diptychs: Sequence[Diptych]) -> list[str | None]:
    """Return the reason of the first filter that rejects each diptych, or None.

    Args:
        filters: In order; each gets only what passed the previous ones.
        diptychs: Generated diptychs.
    """
    found: list[str | None] = [None] * len(diptychs)
    for one in filters:
        passing = [i for i, reason in enumerate(found) if reason is None]
        if passing:
            reasons = one.reasons([diptychs[i] for i in passing])
            for i, reason in zip(passing, reasons, strict=True):
                found[i] = reason
    return found


class MinimumChange(Filter):
    """Rejects diptychs whose halves are almost equal.

    Args:
        least: Minimum share of changed pixels.
    """

    def __init__(self, least: float = 0.001) -> None:
        check_number("least", least, most=1, above=0)
        self.least = least

    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return why each diptych is left out, or None."""
        alike = [d.change.mean().item() < self.least for d in diptychs]
        return ["with halves that are alike" if same else None for same in alike]


class LocalChange(Filter):
    """Rejects diptychs whose halves also differ outside the changed region, or throughout.

    Args:
        least: Minimum structural similarity (SSIM) of the halves outside the changed region.
        most_changed: Maximum share of changed pixels.
    """

    def __init__(self, least: float = 0.8, most_changed: float = 0.5) -> None:
        check_number("least", least, -1, 1)
        check_number("most_changed", most_changed, 0, 1)
        self.least, self.most_changed = least, most_changed

    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return why each diptych is left out, or None."""
        left, right, change = (
            torch.stack([getattr(d, name).float() for d in diptychs])
            for name in ("left", "right", "change")
        )
        # with equal content in the changed region, it does not affect the SSIM around it
        other = torch.where(change > 0, left, right)
        _, ssim = structural_similarity_index_measure(
            left, other, data_range=2.0, return_full_image=True, reduction="none"
        )
        rest = 1 - change
        values = (ssim.mean(1, keepdim=True) * rest).sum((1, 2, 3)) / rest.sum((1, 2, 3))
        wide = change.mean((1, 2, 3)) > self.most_changed
        wrong = wide | ~(values >= self.least)  # NaN if all has changed
        return ["with halves that differ elsewhere" if bad else None for bad in wrong.tolist()]


class AttributeHolds(Filter):
    """Rejects diptychs whose left half lacks the attribute, or whose right half has it.

    Args:
        judge: Scores the changed attribute by its name; both halves against the left one's prompt.
        left_least: Minimum score of the left half.
        right_most: Maximum score of the right half.
    """

    def __init__(self, judge: Judge, left_least: float = 0.8, right_most: float = 0.6) -> None:
        check_number("left_least", left_least)
        check_number("right_most", right_most, most=left_least)
        self.judge, self.left_least, self.right_most = judge, left_least, right_most

    def prepare(self) -> None:
        """Load the judge."""
        self.judge.prepare()

    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return why each diptych is left out, or None."""
        left, right = (
            self._scores(torch.stack([getattr(d, side) for d in diptychs]), diptychs)
            for side in ("left", "right")
        )
        found: list[str | None] = []
        for holds, holds_too in zip(left, right, strict=True):
            reason = "with the wrong thing on the left" if not holds >= self.left_least else None
            if reason is None and not holds_too <= self.right_most:
                reason = "with the right thing on the right"
            found.append(reason)
        return found

    def _scores(self, images: Tensor, diptychs: Sequence[Diptych]) -> list[float]:
        scores = self.judge.attributes(images, [d.prompt for d in diptychs])
        missing = {d.target.kind for d in diptychs} - set(scores)
        if missing:
            raise InputError(
                f"{type(self.judge).__name__} does not score {', '.join(sorted(missing))}: give "
                "`AttributeHolds` another judge, or corrupt another attribute."
            )
        return [scores[d.target.kind][i].item() for i, d in enumerate(diptychs)]


class TextHolds(Filter):
    """Rejects diptychs whose left half lacks the text, or whose right half has it too.

    Only letters and digits are compared, case-insensitively.

    Args:
        reader: Import path of a function that returns the lines of text in a PIL image; RapidOCR,
            by default (`pip install lit-prefopt[ocr]`, models included).
    """

    def __init__(self, reader: Callable | None = None) -> None:
        self.reader: Callable[[Image.Image], list[str]] = reader or rapid_ocr()

    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return why each diptych is left out, or None."""
        return [self._reason(diptych) for diptych in diptychs]

    def _reason(self, diptych: Diptych) -> str | None:
        left, right = (self._read(image) for image in (diptych.left, diptych.right))
        if not left and not right:
            return "without any text that the reader finds"
        wanted, other = _letters(diptych.target.left), _letters(diptych.target.right)
        if not _contains_text(left, wanted, other):
            return "with the wrong text on the left"
        return "with the right text on the right" if _contains_text(right, wanted, other) else None

    def _read(self, image: Tensor) -> str:
        return "".join(map(_letters, self.reader(to_pil(image))))


def _contains_text(text: str, wanted: str, other: str) -> bool:
    """Return whether a text contains the wanted text, other than as a part of the other one."""
    return wanted in text and not (wanted in other and other in text)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


class CallableFilter(Filter):
    """Filters by a function of your own, such as one that calls a vision-language model.

    Args:
        function: Import path of a function of the two halves (PIL images), the two prompts and the
            target (`generate.corruptions.CorruptionTarget`) that returns whether to keep it.
        name: The reason in the counts of rejected diptychs.
    """

    def __init__(self, function: Callable, name: str = "rejected by the function") -> None:
        self.function, self.name = function, name

    def reasons(self, diptychs: Sequence[Diptych]) -> list[str | None]:
        """Return why each diptych is left out, or None."""
        kept = [
            self.function(to_pil(d.left), to_pil(d.right), d.prompt, d.other, d.target)
            for d in diptychs
        ]
        return [None if keep else self.name for keep in kept]
