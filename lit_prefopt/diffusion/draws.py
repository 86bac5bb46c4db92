"""Everything random about a sample, drawn from the sample's own seed.

Draws depend on (seed, purpose) alone: not on the device, the batch a sample falls into, the rank
that reads it, or what was drawn before. A resumed run therefore sees what the uninterrupted run
would have seen, and every validation sees the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return the CPU generator of one sample for one purpose."""
    return torch.Generator().manual_seed(_seed(seed, purpose))


def uniform(seeds: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Return numbers in [0, 1), one per sample or an array of them, (B, *shape) float64."""
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.rand(tuple(shape), generator=s, dtype=torch.float64) for s in sources]
    return torch.stack(draws).to(seeds.device)


def subseeds(seeds: Tensor, count: int, purpose: str) -> Tensor:
    """Return `count` seeds made from each seed, (B, count) int64."""
    made = [[_seed(seed, f"{purpose} {i}") for i in range(count)] for seed in seeds.tolist()]
    return torch.tensor(made, device=seeds.device)


def normal(seeds: Tensor, shape: Sequence[int], purpose: str) -> Tensor:
    """Return Gaussian noise of the given shape per sample, (B, *shape) float32."""
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.randn(tuple(shape), generator=source) for source in sources]
    return torch.stack(draws).to(seeds.device)


def _seed(seed: int, purpose: str) -> int:
    digest = hashlib.blake2s(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
