"""Everything random about a sample, drawn from the sample's own seed.

Draws depend on (seed, purpose) alone: not on the device, the batch a sample falls into, the rank
that reads it, or what was drawn before. A resumed run therefore sees what the uninterrupted run
would have seen, and every validation sees the same noise.

Seeds of a batch stay on the host: read from a GPU, they would make the host wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prefopt.utils.transfer import to_device


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return the CPU generator of one sample for one purpose."""
    return torch.Generator().manual_seed(_seed(seed, purpose))


def uniform(
    seeds: Tensor, purpose: str, shape: Sequence[int] = (), device: torch.device | None = None
) -> Tensor:
    """Return numbers in [0, 1), one per sample or an array of them, (B, *shape) float64.

    Args:
        seeds: (B,) int64.
        purpose: What they are drawn for.
        shape: Of each sample's numbers.
        device: Where they go; where the seeds are, if it is not given.
    """
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.rand(tuple(shape), generator=s, dtype=torch.float64) for s in sources]
    return to_device(torch.stack(draws), device or seeds.device)


def subseeds(seeds: Tensor, count: int, purpose: str) -> Tensor:
    """Return `count` seeds made from each seed, (B, count) int64."""
    made = [[_seed(seed, f"{purpose} {i}") for i in range(count)] for seed in seeds.tolist()]
    return torch.tensor(made, device=seeds.device)


def normal(
    seeds: Tensor, shape: Sequence[int], purpose: str, device: torch.device | None = None
) -> Tensor:
    """Return Gaussian noise of the given shape per sample, (B, *shape) float32.

    Args:
        seeds: (B,) int64.
        shape: Of each sample's noise.
        purpose: What it is drawn for.
        device: Where it goes; where the seeds are, if it is not given.
    """
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.randn(tuple(shape), generator=source) for source in sources]
    return to_device(torch.stack(draws), device or seeds.device)


def _seed(seed: int, purpose: str) -> int:
    digest = hashlib.blake2s(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
