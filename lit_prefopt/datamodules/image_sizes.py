"""Check the sizes of a data module's images against a backbone, before the first batch."""

from __future__ import annotations

from lit_prefopt.backbones import Backbone
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.datamodules.cached import CachedPairs
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.datamodules.rollouts import PromptCollections
from lit_prefopt.errors import InputError


def check_image_sizes(backbone: Backbone, data: object) -> None:
    """Check that a backbone can encode or denoise the images of every batch.

    Args:
        backbone: The backbone to train.
        data: The data module, after its setup; one without stored pairs is not checked.

    Raises:
        InputError: A batch would have images of a size that the backbone cannot have.
    """
    pairs = data.held_out if isinstance(data, PromptCollections) else data
    if not isinstance(pairs, StoredPairs):
        return
    for width, height in pairs.image_sizes:
        if not backbone.has_size(height, width):
            raise InputError(
                f"{type(data).__name__} yields images of {width} x {height} pixels, which "
                f"{type(backbone).__name__} cannot take: {_cure(backbone, pairs)}."
            )


def _cure(backbone: Backbone, data: StoredPairs) -> str:
    """Return what to change, for messages."""
    if isinstance(data, CachedPairs):
        return f"cache the pairs again with `--model.resolution` {backbone.sizes}"
    if isinstance(data, PairShards) and data.shaping.aspect_buckets:
        most = backbone.largest_side
        lower = "" if most is None else f", and no side above {most} (lower `--data.resolution`)"
        return (
            "choose `--data.resolution` and `--data.bucket_step` as multiples of "
            f"{backbone.size_multiple}{lower}"
        )
    return f"set `--data.resolution` to {backbone.sizes}"
