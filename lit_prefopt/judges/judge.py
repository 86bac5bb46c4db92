"""Anything that scores images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Judge(ABC):
    """Scores how well images follow their prompts; higher is better."""

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
