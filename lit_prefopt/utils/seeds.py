"""Seeds that stay the same from one process, machine and Python to the next."""

from __future__ import annotations

from hashlib import blake2s


def stable_seed(*parts: str | int) -> int:
    """Return a seed of 63 bits for these parts, in this order."""
    # never hash(): it is salted anew in every process
    digest = blake2s("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Return the seed from which everything random about one sample of one epoch is drawn.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        position: Place of the sample in the epoch's order, counted over all ranks.
    """
    return stable_seed("sample", seed, epoch, position)
