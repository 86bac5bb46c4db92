"""Anything that scores images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_prefopt.errors import InputError


class Judge(ABC):
    """Scores how well images follow their prompts; higher is better.

    Weights are loaded when they are asked for first: by `prepare`, which whoever holds a judge
    calls before a run begins, or by the first score.
    """

    def prepare(self) -> None:  # noqa: B027 - some need nothing
        """Load what is needed to score; whatever is missing is told now, in one sentence.

        Raises:
            InputError: It cannot score.
        """

    def versions(self) -> dict[str, str | None]:
        """Return what the weights are, by where they come from; None where that is unknown."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what an evaluation writes down: class, plain arguments, versions of the weights.

        Ask after `prepare`: what has not been fetched yet has no version.
        """
        plain = {k: v for k, v in vars(self).items() if isinstance(v, str | int | float | None)}
        versions = self.versions()
        settings = {"class": type(self).__name__, **plain}
        return settings | ({"versions": versions} if versions else {})

    @abstractmethod
    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,) that the images were predicted at, for judges that are step-aware.
        """

    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return scores of single attributes by name, each (B,), NaN where one does not apply."""
        return {}


@contextmanager
def full_precision(images: Tensor) -> Iterator[Tensor]:
    """Lend the images in float32, outside of autocast: near ones differ in late digits of scores.

    Args:
        images: (B, 3, H, W).
    """
    with torch.autocast(images.device.type, enabled=False):
        yield images.float()


def checked_scores(
    judge: Judge, images: Tensor, texts: Sequence[str], t: Tensor | None = None
) -> Tensor:
    """Return a judge's scores, (B,) float32, after a look at them.

    Args:
        judge: Any judge.
        images: (B, 3, H, W) in [-1, 1].
        texts: B prompts.
        t: Timesteps (B,) that the images were predicted at.

    Raises:
        InputError: The judge does not give one number for each image.
    """
    scores = judge.score(images, texts, t)
    if scores.shape != (len(images),) or not torch.isfinite(scores).all():
        raise InputError(
            f"{type(judge).__name__} gave {tuple(scores.shape)} scores for {len(images)} "
            f"images, {int((~torch.isfinite(scores)).sum())} of them no number: mend the judge."
        )
    return scores.float()
