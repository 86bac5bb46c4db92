"""A step-aware judge in training: its optimizer, its batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prefopt.batches import ImagePairs
from lit_prefopt.judges import StepAwarePreference
from lit_prefopt.optimizers import OptimizerConfig
from tests.helpers.batches import image_pairs

Make = Callable[..., StepAwarePreference]


class SGD(OptimizerConfig):
    """Steps that show the gradient."""

    def build(self, parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr)


def batch(count: int = 3, seed: int = 0, **changes: object) -> ImagePairs:
    """Return pairs, each with a prompt."""
    texts = ["a cat", "two dogs", "the sea", "rain"]
    pairs = image_pairs(count, seed=seed)
    return pairs._replace(texts=[texts[i % 4] for i in range(count)], **changes)


def cut(pairs: ImagePairs, rows: slice) -> ImagePairs:
    """Return some of the pairs."""
    named = pairs._asdict()
    return ImagePairs(
        **{k: v[rows] if isinstance(v, Tensor | list) else v for k, v in named.items()}
    )
