"""Deterministic seeds, equal in all processes, machines and Python versions."""

from __future__ import annotations

from hashlib import blake2s


def stable_seed(*parts: str | int) -> int:
    """Return a seed of 63 bits derived from these parts, in this order."""
    # not hash(), which is salted in every process
    digest = blake2s("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Return the seed of all random draws for one sample of one epoch.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        position: Position of the sample in the epoch's order, over all ranks.
    """
    return stable_seed("sample", seed, epoch, position)
