"""Scores and noise seeds of the sides of a sample, and those of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.data.shards.sides import scores_in, seeds_in


class SideNumbers(NamedTuple):
    """What is known of each side of a sample beside its image; None if it is not known of all."""

    scores: list[float] | None  # K
    noise_seeds: list[int] | None  # K

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], sides: int) -> SideNumbers:
        """Return the numbers in a sample's .json.

        Args:
            meta: The .json.
            sides: Number of its sides.
        """
        return cls(scores_in(meta, sides), seeds_in(meta, sides))


def collate_numbers(known: Sequence[SideNumbers]) -> tuple[Tensor | None, Tensor | None]:
    """Return scores (B, K) and noise seeds (B, K) of a batch, None unless all are known."""
    scores = [one.scores for one in known if one.scores is not None]
    seeds = [one.noise_seeds for one in known if one.noise_seeds is not None]
    return (
        torch.tensor(scores, dtype=torch.float32) if len(scores) == len(known) else None,
        torch.tensor(seeds, dtype=torch.int64) if len(seeds) == len(known) else None,
    )
