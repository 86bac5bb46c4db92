"""From images, or from what was made of them before, to latents."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import ImagePairs, LatentPairs, Pairs
from lit_prefopt.diffusion import draws


@torch.no_grad()
def encode_pairs(backbone: Backbone, batch: ImagePairs) -> Pairs:
    """Return the latents of all sides, drawn by the VAE, and the embedded prompts.

    Args:
        backbone: Its VAE and text encoders speak.
        batch: B pairs of images.
    """
    images = batch.scaled().images
    sides = images.shape[:2]
    mean, deviation = (x.unflatten(0, sides) for x in backbone.encode(images.flatten(0, 1)))
    latents = _drawn(mean, deviation, batch.seeds)
    masks = None if batch.masks is None else resize_masks(batch.masks, latents)
    prompt = backbone.embed(batch.texts)
    return Pairs(latents, prompt, batch.seeds, batch.labels, batch.weights, masks, batch.frames)


@torch.no_grad()
def draw_latents(backbone: Backbone, batch: LatentPairs) -> Pairs:
    """Return the latents of all sides as `encode_pairs` draws them, from what was encoded before.

    Args:
        backbone: Says how its VAE's latents are scaled.
        batch: B pairs.
    """
    latents = backbone.scaled(batch.mean)
    if batch.deviation is not None:
        latents = _drawn(latents, backbone.scaled(batch.deviation), batch.seeds)
    return Pairs(
        latents,
        batch.prompt,
        batch.seeds,
        batch.labels,
        batch.weights,
        batch.masks,
        batch.frames,
        batch.reference_error,
    )


def resize_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """Return masks (B, 1, H, W) at the size of latents."""
    return torch.nn.functional.interpolate(masks, latents.shape[-2:], mode="area")


def _drawn(mean: Tensor, deviation: Tensor, seeds: Tensor) -> Tensor:
    """Return latents (B, K, C, H, W) of that mean and deviation."""
    # One draw for all sides: what the VAE adds at random must not tell them apart.
    return mean + deviation * draws.normal(seeds, mean.shape[2:], "vae", mean.device)[:, None]
