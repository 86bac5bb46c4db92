"""Random numbers of a sample, drawn from its seed.

They depend only on (seed, purpose), not on device, batch, rank or earlier draws. A resumed run
therefore gets the random numbers of an uninterrupted one, and every validation the same noise.

Seeds of a batch stay on the CPU: reading them from a GPU would synchronise with it.
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
        purpose: Name of their use; different uses are independent.
        shape: Shape of each sample's numbers.
        device: Device of the result; that of the seeds if not given.
    """
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.rand(tuple(shape), generator=s, dtype=torch.float64) for s in sources]
    return to_device(torch.stack(draws), device or seeds.device)


def subseeds(seeds: Tensor, count: int, purpose: str) -> Tensor:
    """Return `count` seeds derived from each seed, (B, count) int64."""
    made = [[_seed(seed, f"{purpose} {i}") for i in range(count)] for seed in seeds.tolist()]
    return torch.tensor(made, device=seeds.device)


def normal(
    seeds: Tensor, shape: Sequence[int], purpose: str, device: torch.device | None = None
) -> Tensor:
    """Return Gaussian noise of the given shape per sample, (B, *shape) float32.

    Args:
        seeds: (B,) int64.
        shape: Shape of each sample's noise.
        purpose: Name of its use; different uses are independent.
        device: Device of the result; that of the seeds if not given.
    """
    sources = [generator(seed, purpose) for seed in seeds.tolist()]
    draws = [torch.randn(tuple(shape), generator=source) for source in sources]
    return to_device(torch.stack(draws), device or seeds.device)


def _seed(seed: int, purpose: str) -> int:
    digest = hashlib.blake2s(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
