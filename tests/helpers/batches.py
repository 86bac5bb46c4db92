"""Small batches of random pictures."""

from __future__ import annotations

import torch

from lit_prefopt.batches import ImagePairs

TEXTS = ["a cat", "", "two dogs", "the sea", "a red house", "rain"]


def image_pairs(count: int = 3, sides: int = 2, seed: int = 0) -> ImagePairs:
    """Return pictures of 32 x 32 pixels."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(count, sides, 3, 32, 32, generator=random) * 2 - 1
    texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    seeds = torch.arange(count) + 100 * seed
    keys = [f"shard/{i:06d}" for i in range(count)]
    return ImagePairs(images, texts, seeds, torch.ones(count), torch.ones(count), keys)


def images(count: int) -> ImagePairs:
    """Return pairs of grey pictures."""
    return ImagePairs(
        torch.zeros(count, 2, 3, 32, 32),
        ["a fox", "", *["the sea"] * (count - 2)],
        torch.arange(count),
        torch.ones(count),
        torch.ones(count),
        ["key"] * count,
        masks=torch.ones(count, 1, 32, 32),
        frames=torch.tensor([32, 32, 0, 0, 32, 32]).expand(count, 2, 6),
    )
