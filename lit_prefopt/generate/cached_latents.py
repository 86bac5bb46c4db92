"""Store cached latents again with the prompts of another model that has the same VAE."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.images import BrokenSample, Size
from lit_prefopt.data.latents.latent_reader import LatentSample, members_of
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules.generation import StoredGroup
from lit_prefopt.errors import InputError
from lit_prefopt.utils.fingerprint import fingerprint

log = logging.getLogger(__name__)

VAE = "vae"
IMAGES = ("resolution", "crop", "flip", "views", "deviation")
"""Settings of the encoded images that are given by the cache."""


class EncodedPair(NamedTuple):
    """One pair as stored in the cache."""

    text: str
    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    shard: int
    size: Size  # of the best side

    def write_to(self, writer: ShardWriter) -> None:
        """Write the pair into the shard of the same number as its image shard."""
        members = members_of(self.text, self.tensors, self.meta)
        writer.add_members(members, self.size, self.shard, self.tensors["mean"].shape[1])


def check_same_vae(backbone: Backbone, latents: LatentSet, settings: Mapping[str, Any]) -> None:
    """Check that a backbone's VAE would encode the images of a cache to the same latents.

    Scale and shift may differ: a cache stores what the VAE returns.

    Args:
        backbone: The backbone whose prompts are to be cached.
        latents: Manifest of the cached latents.
        settings: Settings of the images that the backbone's cache is to have, by name.

    Raises:
        InputError: The VAE has other weights or another precision, or the images other settings.
    """
    made, made_by = latents.settings, latents.notes.get("checkpoint")
    own = backbone.encoders.get(VAE)
    if own is None or made["encoders"].get(VAE) != fingerprint(own):
        raise InputError(
            f"The latents are those of {made_by} in {made['dtype']}, whose VAE has other weights "
            f"or another precision than that of {backbone.checkpoint}: encode the images "
            "(`--data SampleGroups --data.shards FOLDER`), or take the same `--backbone.vae` and "
            "`.dtype`."
        )
    differing = {name: made[name] for name in IMAGES if made[name] != settings[name]}
    if differing:
        cure = " ".join(f"--model.{name} {_yaml(value)}" for name, value in differing.items())
        found = ", ".join(
            f"{name} {_yaml(value)} and not {_yaml(settings[name])}"
            for name, value in differing.items()
        )
        raise InputError(
            f"The latents of {made_by} were cached with {found}: set `{cure}`, or encode the "
            "images (`--data SampleGroups --data.shards FOLDER`)."
        )
    shape = backbone.latent_settings()
    for name in ("latent_channels", "pixels_per_latent"):
        if made[name] != shape[name]:
            raise InputError(
                f"The latents of {made_by} have {name} {made[name]} and those of "
                f"{backbone.checkpoint} {shape[name]}: encode the images (`--data SampleGroups "
                "--data.shards FOLDER`)."
            )


def fitting(latents: LatentSet, group: StoredGroup) -> tuple[list[tuple[LatentSample, int]], int]:
    """Return the cached samples of a group with their shards' numbers, and how many are broken.

    Args:
        latents: Manifest of the cached latents, which a sample must fit.
        group: A group of cached samples.
    """
    found = []
    for sample, shard in zip(group.samples, group.shards, strict=True):
        try:
            latents.check(sample)
        except BrokenSample as error:
            log.warning("A pair cannot be used and is skipped: %s %s.", sample.name, error)
        else:
            found.append((sample, shard))
    return found, len(group.samples) - len(found)


@torch.no_grad()
def with_prompts(
    backbone: Backbone, pairs: Sequence[tuple[LatentSample, int]], at_a_time: int
) -> list[EncodedPair]:
    """Return cached pairs with prompts that a backbone embeds anew.

    Args:
        backbone: The backbone.
        pairs: Cached samples with the numbers of their shards.
        at_a_time: Number of prompts that are embedded together.
    """
    made = []
    for start in range(0, len(pairs), at_a_time):
        some = pairs[start : start + at_a_time]
        prompt = backbone.embed([sample.text for sample, _ in some]).cpu()
        for i, (sample, shard) in enumerate(some):
            tensors = sample.views | prompt.row(i)
            made.append(EncodedPair(sample.text, tensors, sample.meta, shard, sample.sizes[0]))
    return made


def _yaml(value: Any) -> str:
    """Return a setting as it is given on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
