"""Linear head shared by the aesthetic predictor and ImageReward."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)


class LinearHead(nn.Module):
    """Five linear layers without activations: one score per feature vector.

    The layer numbers of published weights include the dropout after the first three layers.

    Args:
        width: Width of the vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((width, *WIDTHS), WIDTHS, strict=False)):
            layers.append(nn.Linear(before, after))
            if number < 3:
                layers.append(nn.Identity())
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Return a score for each vector (B, width): (B,)."""
        return self.layers(features).squeeze(-1)
