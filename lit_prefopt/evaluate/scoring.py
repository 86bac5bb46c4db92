"""Scorers of an evaluation: judges, image similarity, OCR."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_prefopt.data.images import to_pil
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.rows import Attributes, ImageScores, number_or_none
from lit_prefopt.judges.clip import CLIPJudge
from lit_prefopt.judges.judge import Judge, checked_scores, full_precision
from lit_prefopt.judges.ocr import rapid_ocr

QUOTED = re.compile(r"\"([^\"]*)\"|“([^”]*)”|(?<!\w)'([^']*)'(?!\w)|(?<!\w)‘([^’]*)’(?!\w)")


class TextReader:
    """Checks an image for the text quoted in its prompt, comparing letters and digits only.

    Args:
        reader: Import path of a function that returns the lines of text in a PIL image; RapidOCR,
            by default (`pip install lit-prefopt[ocr]`, models included).
    """

    def __init__(self, reader: Callable | None = None) -> None:
        self.reader: Callable[[Image.Image], list[str]] = reader or rapid_ocr()

    def score(self, image: Tensor, text: str) -> float | None:
        """Return 1 if all texts quoted in a prompt are found in an image, else 0.

        Args:
            image: (3, H, W) in [-1, 1].
            text: The prompt; without quoted text the result is None.
        """
        wanted = quoted(text)
        if not wanted:
            return None
        found = "".join(_letters(line) for line in self.reader(to_pil(image)))
        return float(all(_letters(words) in found for words in wanted))

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the results."""
        return {"reader": f"{self.reader.__module__}.{self.reader.__qualname__}"}


def quoted(text: str) -> list[str]:
    """Return the quoted texts of a prompt; apostrophes are not quotes."""
    found = ["".join(groups) for groups in QUOTED.findall(text)]
    return [words for words in found if _letters(words)]


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


class Scorers:
    """Judges, image similarity and OCR of an evaluation.

    Args:
        judge: Its score is the reward; it is named by its class.
        judges: Further judges by name, reported in addition.
        similarity: A CLIP whose image features measure the similarity of images.
        text: Reads text in images.
    """

    def __init__(
        self,
        judge: Judge,
        judges: Mapping[str, Judge] | None = None,
        similarity: CLIPJudge | None = None,
        text: TextReader | None = None,
    ) -> None:
        name, others = type(judge).__name__, judges or {}
        if {name, "prompts"} & set(others):
            raise InputError(
                f"`judges` may not contain the names {name} and prompts: choose other names."
            )
        self.judge, self.judges = judge, {name: judge, **others}
        self.similarity, self.text = similarity, text

    def prepare(self) -> None:
        """Load all models; raise InputError if something is missing."""
        for judge in self.judges.values():
            judge.prepare()
        if self.similarity is not None:
            self.similarity.prepare()

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the scores."""
        return {
            "judges": {name: judge.settings() for name, judge in self.judges.items()},
            "similarity": None if self.similarity is None else self.similarity.settings(),
            "text": None if self.text is None else self.text.settings(),
        }

    @torch.no_grad()
    def score_images(self, images: Tensor, texts: Sequence[str]) -> list[ImageScores]:
        """Score each image.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
        """
        scores: dict[str, list[float]] = {}
        attributes: dict[str, list[Attributes]] = {}
        with full_precision(images) as seen:
            for name, judge in self.judges.items():
                scores[name] = checked_scores(judge, seen, texts).tolist()
                found = judge.attributes(seen, texts)
                if found:
                    attributes[name] = _by_image(found, len(texts))
        read = self._read(images, texts)
        return [
            ImageScores(
                {name: values[i] for name, values in scores.items()},
                {name: values[i] for name, values in attributes.items()},
                read=read[i],
            )
            for i in range(len(texts))
        ]

    def _read(self, images: Tensor, texts: Sequence[str]) -> list[float | None]:
        if self.text is None:
            return [None] * len(texts)
        return [self.text.score(*one) for one in zip(images, texts, strict=True)]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor | None:
        """Return the normalized CLIP features of images, (B, D) on the CPU, if enabled.

        Args:
            images: (B, 3, H, W) in [-1, 1].
        """
        if self.similarity is None:
            return None
        self.similarity.clip.to(images.device)
        with full_precision(images) as seen:
            parts = [
                self.similarity.image_features(part, None).float()
                for part in seen.split(self.similarity.batch_size)
            ]
        return F.normalize(torch.cat(parts), dim=1).cpu()


def _by_image(attributes: dict[str, Tensor], count: int) -> list[Attributes]:
    columns = {name: number_or_none(values.tolist()) for name, values in attributes.items()}
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]
