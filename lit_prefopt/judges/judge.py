"""Base class of judges, which score images."""

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

    Weights are loaded lazily: by `prepare`, which the owner of a judge calls before a run, or by
    the first score.
    """

    def prepare(self) -> None:  # noqa: B027 - some need nothing
        """Load the weights; raise InputError if something is missing.

        Raises:
            InputError: It cannot score.
        """

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights by their sources; None if unknown."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings that an evaluation saves: class, arguments, versions of the weights.

        Call it after `prepare`: weights have no version before they are downloaded.
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
            t: Timesteps (B,) of the predictions, for step-aware judges.
        """

    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return scores of single attributes by name, each (B,), NaN if one does not apply."""
        return {}


@contextmanager
def full_precision(images: Tensor) -> Iterator[Tensor]:
    """Yield the images in float32, outside of autocast: close scores differ in late digits.

    Args:
        images: (B, 3, H, W).
    """
    with torch.autocast(images.device.type, enabled=False):
        yield images.float()


def checked_scores(
    judge: Judge, images: Tensor, texts: Sequence[str], t: Tensor | None = None
) -> Tensor:
    """Return a judge's scores, (B,) float32, after a check of shape and finiteness.

    Args:
        judge: Any judge.
        images: (B, 3, H, W) in [-1, 1].
        texts: B prompts.
        t: Timesteps (B,) of the predictions.

    Raises:
        InputError: The judge does not return one finite number per image.
    """
    scores = judge.score(images, texts, t)
    if scores.shape != (len(images),) or not torch.isfinite(scores).all():
        raise InputError(
            f"{type(judge).__name__} returned {tuple(scores.shape)} scores for {len(images)} "
            f"images, {int((~torch.isfinite(scores)).sum())} of them not finite: fix the judge."
        )
    return scores.float()
