"""Compute what a training stores on the disk of its encodings, from shapes."""

from __future__ import annotations

from typing import Any

from lit_prefopt.batches import ImagePairs
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.estimate.step_cost import encoded_pairs
from lit_prefopt.fit_caches.caches import store_bounds
from lit_prefopt.fit_caches.encoding_cache import stored_bytes


def kept_bytes(module: Any, batch: Any, trainer: Any, data: object) -> int:
    """Return the bytes of latents and prompts that a training on images stores at most.

    Prompts without padding are counted with the length of the batch's first one.

    Args:
        module: The method; neither it nor its weights change.
        batch: A batch of the data module.
        trainer: The Trainer of the run.
        data: The data module, after its setup.
    """
    if not isinstance(data, PairShards) or not isinstance(batch, ImagePairs):
        return 0
    return stored_bytes(encoded_pairs(module, batch), store_bounds(trainer, data))
