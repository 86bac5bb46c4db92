"""Judges of two lines, to be named in recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prefopt.judges import Judge

TEXTS, SEEDS = ["a cat", "two dogs"], torch.tensor([3, 8])

SMALL_SPO = {
    "beta": 10.0,
    "eps": 0.1,
    "candidates": 2,
    "first": 1,
    "inner": 0,
    "threshold": 0.0,
}
"""Settings of a small SPO, but for judge and sampling."""


class Brightness(Judge):
    """The brighter the better; it notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int]]] = []

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None
        self.asked.append((list(texts), t.tolist()))
        return images.mean((1, 2, 3))


class Broken(Judge):
    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.tensor(self.scores)
