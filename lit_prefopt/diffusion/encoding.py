"""Encode images, or sample cached posteriors, to latents."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import ImagePairs, LatentPairs, Pairs
from lit_prefopt.diffusion import draws


@torch.no_grad()
def encode_pairs(backbone: Backbone, batch: ImagePairs) -> Pairs:
    """Encode images and prompts: return sampled latents of all sides and embedded prompts.

    Args:
        backbone: Backbone whose VAE and text encoders are used.
        batch: B pairs of images.
    """
    images = batch.scaled().images
    sides = images.shape[:2]
    mean, deviation = (x.unflatten(0, sides) for x in backbone.encode(images.flatten(0, 1)))
    latents = _drawn(mean, deviation, batch.seeds)
    masks = None if batch.masks is None else resize_masks(batch.masks, latents)
    prompt = backbone.embed(batch.texts)
    return Pairs(
        latents,
        prompt,
        batch.seeds,
        batch.labels,
        batch.weights,
        masks,
        batch.frames,
        scores=batch.scores,
        noise_seeds=batch.noise_seeds,
    )


@torch.no_grad()
def encode_posteriors(backbone: Backbone, batch: ImagePairs) -> LatentPairs:
    """Encode images and prompts to what a cache stores: `draw_latents` makes pairs of it.

    Both together are `encode_pairs`, to the last bit.

    Args:
        backbone: Backbone whose VAE and text encoders are used.
        batch: B pairs of images; prompts that were embedded before are taken as they are.
    """
    images = batch.scaled().images
    sides = images.shape[:2]
    mean, deviation = (x.unflatten(0, sides) for x in backbone.posterior(images.flatten(0, 1)))
    return LatentPairs(
        mean,
        deviation,
        backbone.embed(batch.texts) if batch.prompt is None else batch.prompt,
        batch.texts,
        batch.seeds,
        batch.labels,
        batch.weights,
        batch.keys,
        None if batch.masks is None else resize_masks(batch.masks, mean),
        batch.broken,
        batch.frames,
        records=batch.records,
        scores=batch.scores,
        noise_seeds=batch.noise_seeds,
    )


@torch.no_grad()
def draw_latents(backbone: Backbone, batch: LatentPairs) -> Pairs:
    """Sample latents of all sides from cached posteriors, with the noise of `encode_pairs`.

    Args:
        backbone: Backbone that scales its VAE's latents.
        batch: B cached pairs.
    """
    latents = backbone.scaled(batch.mean)
    if batch.deviation is not None:
        latents = _drawn(latents, backbone.scaled_deviation(batch.deviation), batch.seeds)
    return Pairs(
        latents,
        batch.prompt,
        batch.seeds,
        batch.labels,
        batch.weights,
        batch.masks,
        batch.frames,
        batch.reference_error,
        batch.scores,
        batch.noise_seeds,
    )


def resize_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """Resize masks (B, 1, H, W) to the size of latents."""
    return torch.nn.functional.interpolate(masks, latents.shape[-2:], mode="area")


def _drawn(mean: Tensor, deviation: Tensor, seeds: Tensor) -> Tensor:
    """Sample latents (B, K, C, H, W) of a mean and deviation."""
    # One draw for all sides, so that the VAE's noise does not distinguish them.
    return mean + deviation * draws.normal(seeds, mean.shape[2:], "vae", mean.device)[:, None]
