"""Reverse the order of pairs, to train a negative model (Diffusion-NPO, ICLR 2025)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from lit_prefopt.batches import Pairs, Steps

Compared = TypeVar("Compared", Pairs, Steps)


def swapped(batch: Compared) -> Compared:
    """Return pairs or steps with the order of their sides reversed; of single images the label.

    Scores and advantages are negated, so that the best side is still the first.

    Args:
        batch: B rows, best side first.
    """
    labels = 1 - batch.labels if batch.sides == 1 else batch.labels
    if isinstance(batch, Steps):
        return batch._replace(
            parents=batch.parents.flip(1),
            children=batch.children.flip(1),
            labels=labels,
            logp=_flipped(batch.logp),
            means=_flipped(batch.means),
            advantages=_negated(batch.advantages),
        )
    errors = batch.reference_error
    return batch._replace(
        latents=batch.latents.flip(1),
        labels=labels,
        frames=_flipped(batch.frames),
        reference_error=None if errors is None else errors.flip(-1),
        scores=_negated(batch.scores),
        noise_seeds=_flipped(batch.noise_seeds),
        advantages=_negated(batch.advantages),
    )


def _flipped(sides: Tensor | None) -> Tensor | None:
    return None if sides is None else sides.flip(1)


def _negated(sides: Tensor | None) -> Tensor | None:
    return None if sides is None else -sides.flip(1)
