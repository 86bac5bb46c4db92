"""Reverse the order of pairs, to train a negative model (Diffusion-NPO, ICLR 2025)."""

from __future__ import annotations

from typing import TypeVar

from lit_prefopt.batches import Pairs, Steps

Compared = TypeVar("Compared", Pairs, Steps)


def swapped(batch: Compared) -> Compared:
    """Return pairs or steps with the order of their sides reversed; of single images the label.

    Args:
        batch: B rows, best side first.
    """
    if batch.sides == 1:
        return batch._replace(labels=1 - batch.labels)
    if isinstance(batch, Steps):
        return batch._replace(parents=batch.parents.flip(1), children=batch.children.flip(1))
    errors, scores, seeds = batch.reference_error, batch.scores, batch.noise_seeds
    return batch._replace(
        latents=batch.latents.flip(1),
        frames=None if batch.frames is None else batch.frames.flip(1),
        reference_error=None if errors is None else errors.flip(-1),
        scores=None if scores is None else -scores.flip(1),
        noise_seeds=None if seeds is None else seeds.flip(1),
    )
