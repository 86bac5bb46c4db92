"""A judge without weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_prefopt.judges import Judge


class Brightness(Judge):
    """Scores an image by its mean."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Not used.
        """
        return images.float().mean((1, 2, 3))
