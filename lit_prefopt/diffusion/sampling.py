"""Sample images, for evaluation and sample grids."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling


def check_sampling(backbone: Backbone, how: Sampling | None) -> None:
    """Check that images can be sampled with these settings, before the first one is.

    Args:
        backbone: The backbone that will be sampled.
        how: Sampling settings; the backbone's own if not given.

    Raises:
        InputError: The size, the steps or the form of the sampler do not fit the backbone.
    """
    how = how or backbone.sampling
    if how.guided < 1 and backbone.takes_guidance:
        raise InputError(
            f"{type(backbone).__name__} is conditioned on the guidance scale at every step: set "
            "`sampling.guided` to 1."
        )
    if backbone.policy.negative is not None and how.guidance == backbone.GUIDANCE.off:
        raise InputError(
            "A negative model is what guidance points away from, and there is no guidance: set "
            f"`sampling.guidance` to another number than {backbone.GUIDANCE.off:g}, or leave "
            "`negative` out."
        )
    backbone.process.sampler(how, backbone.sampling_shape(how))


@torch.no_grad()
def sample(backbone: Backbone, texts: list[str], seeds: Tensor, how: Sampling) -> Tensor:
    """Sample one image for each text and seed, (B, 3, H, W) in [-1, 1].

    The noise of an image is drawn from its seed and does not depend on the batch.

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        texts: B prompts.
        seeds: (B,) int64.
        how: Sampling settings.
    """
    check_sampling(backbone, how)
    batches = zip(_chunks(texts, how.batch_size), seeds.split(how.batch_size), strict=True)
    return torch.cat([_sample_batch(backbone, *batch, how) for batch in batches])


def _chunks(texts: list[str], size: int) -> list[list[str]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def _sample_batch(backbone: Backbone, texts: list[str], seeds: Tensor, how: Sampling) -> Tensor:
    return backbone.decode(sample_latents(backbone, backbone.embed(texts), seeds, how))


@torch.no_grad()
def sample_latents(backbone: Backbone, prompt: Prompt, seeds: Tensor, how: Sampling) -> Tensor:
    """Sample the clean latents of one image for each prompt and seed, (B, C, H, W), in one batch.

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        prompt: B rows.
        seeds: (B,) int64.
        how: Sampling settings, checked by `check_sampling`.
    """
    shape = backbone.sampling_shape(how)
    sampler = backbone.process.sampler(how, shape)
    device = prompt.device
    latents = draws.normal(seeds, shape, "start", device)
    for i, t in enumerate(sampler.levels[:-1]):
        times = t.to(device).expand(len(seeds))
        scale = how.guidance if how.guides(i) else backbone.GUIDANCE.off
        prediction = guided(backbone, latents, times, prompt, scale)
        noise = None
        if sampler.draws_noise(i):
            noise = draws.normal(seeds, shape, f"step {i}", device)
        latents = sampler.step(prediction, latents, i, noise)
    return latents
