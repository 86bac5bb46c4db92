"""Denoising errors, and the log-ratios that they stand for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Pairs, Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.processes.discrete import DiscreteProcess


def discounted(u: Tensor, gamma: float, steps: int) -> Tensor:
    """Return the quantiles of noise levels whose weight falls towards the clean end.

    Of `steps` equal parts of [0, 1), the noisiest one has the weight 1 and each next one gamma
    times the weight before it (arXiv 2402.08265); within a part the weight falls likewise.

    Args:
        u: Uniform draws in [0, 1), of any shape, float64.
        gamma: In (0, 1]; 1 returns the draws as they are.
        steps: Number of parts.

    Returns:
        Numbers in [0, 1) of the same shape; 0 is clean.
    """
    if gamma == 1:
        return u
    least = gamma**steps
    quantiles = 1 - (least + u * (1 - least)).log() / (steps * math.log(gamma))
    return quantiles.clamp(0, 1 - 1e-9)  # rounding may step out of the range


class NoisedPairs(NamedTuple):
    """All sides of a batch of pairs as the denoiser sees them."""

    latents: Tensor  # (B * K, C, H, W), noised
    t: Tensor  # (B,) int64
    prompt: Prompt  # B * K rows
    target: Tensor  # (B, K, C, H, W): what the denoiser should say
    masks: Tensor | None  # (B, 1, H, W)

    @classmethod
    def from_pairs(
        cls, process: DiscreteProcess, pairs: Pairs, t: Tensor, noise: Tensor
    ) -> NoisedPairs:
        """Noise all sides of each pair with the same timestep (B,) and noise (B, C, H, W)."""
        sides = pairs.sides
        latents = pairs.latents.flatten(0, 1)
        noise, times = noise.repeat_interleave(sides, 0), t.repeat_interleave(sides)
        target = process.target(latents, noise, times).unflatten(0, pairs.latents.shape[:2])
        noised = process.add_noise(latents, noise, times)
        return cls(noised, t, pairs.prompt_per_side, target, pairs.masks)

    @property
    def t_per_side(self) -> Tensor:
        """Timesteps of the noised latents, (B * K,)."""
        return self.t.repeat_interleave(self.target.shape[1])


def noise_pairs(
    process: DiscreteProcess, pairs: Pairs, t: Tensor, *, masked: bool = False
) -> NoisedPairs:
    """Return all sides noised alike, with one noise of each pair that is drawn from its seed.

    Args:
        process: What noising is.
        pairs: B pairs.
        t: Their timesteps, (B,).
        masked: Whether errors count only where a pair's mask says so, if it has one.
    """
    # The same noise on all sides: its variance cancels in their difference.
    noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "noise", pairs.latents.device)
    return NoisedPairs.from_pairs(
        process, pairs if masked else pairs._replace(masks=None), t, noise
    )


class DenoisingErrors(NamedTuple):
    """How far the denoiser was from its target."""

    value: Tensor  # (B, K) float32: squared residual of each side, mean over C, H, W
    overlap: Tensor  # (B, K) float32: mean product of each side's residual and the chosen side's


def denoising_errors(
    prediction: Tensor, target: Tensor, masks: Tensor | None = None
) -> DenoisingErrors:
    """Return the mean squared error of every side, in float32.

    Args:
        prediction: What the denoiser said, (B, K, C, H, W).
        target: What it should have said, (B, K, C, H, W).
        masks: Share of each place that counts, (B, 1, H, W); the mean is over that part alone.
    """
    residual = prediction.float() - target.float()
    if masks is not None:
        weight = masks[:, None] / masks[:, None].mean((-2, -1), keepdim=True).clamp(min=1e-6)
        residual = residual * weight.sqrt()
    detached = residual.detach()
    return DenoisingErrors(
        residual.square().mean((2, 3, 4)), (detached * detached[:, :1]).mean((2, 3, 4))
    )


def predict_errors(backbone: Backbone, noised: NoisedPairs) -> DenoisingErrors:
    """Return the errors of the network that speaks now, all sides in one forward."""
    prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    prediction = prediction.unflatten(0, noised.target.shape[:2])
    return denoising_errors(prediction, noised.target, noised.masks)


def error_log_ratios(policy: Tensor, reference: Tensor | None) -> Tensor:
    """Return half the drop in error from reference to policy, (B, K).

    It estimates log policy(x) / reference(x) up to a constant that beta takes up (Diffusion-DPO,
    arXiv 2311.12908, Eq. 14; the 1/2 stands in the released code). Without a reference it is
    minus half the policy's error.
    """
    zero = torch.zeros_like(policy) if reference is None else reference
    return 0.5 * (zero - policy)
