"""Denoising errors, and log-ratios computed from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.processes.base import Process
from lit_prefopt.utils.transfer import to_device


def discounted(u: Tensor, gamma: float, steps: int) -> Tensor:
    """Return quantiles of noise levels with a discount towards the clean end.

    Of `steps` equal parts of [0, 1), the noisiest has weight 1 and each next one gamma times the
    weight before it (arXiv 2402.08265); within a part the weight decays at the same rate.

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
    return quantiles.clamp(0, 1 - 1e-9)  # rounding may leave the range


class NoisedPairs(NamedTuple):
    """Noised sides of a batch of pairs, with the denoiser's target."""

    latents: Tensor  # (B * K, C, H, W), noised
    t: Tensor  # (B,) in the process's dtype: noise levels
    prompt: Prompt  # B * K rows
    target: Tensor  # (B, K, C, H, W): target of the prediction
    masks: Tensor | None  # (B, 1, H, W)

    @classmethod
    def from_pairs(cls, process: Process, pairs: Pairs, t: Tensor, noise: Tensor) -> NoisedPairs:
        """Add noise at the same level (B,) to all sides of each pair.

        Args:
            process: The noise process.
            pairs: B pairs.
            t: Noise levels, (B,).
            noise: The same noise for all sides (B, C, H, W), or that of each (B, K, C, H, W).
        """
        sides = pairs.sides
        latents = pairs.latents.flatten(0, 1)
        per_side = noise.flatten(0, 1) if noise.ndim == 5 else noise.repeat_interleave(sides, 0)
        noise, times = per_side, t.repeat_interleave(sides)
        target = process.target(latents, noise, times).unflatten(0, pairs.latents.shape[:2])
        noised = process.add_noise(latents, noise, times)
        return cls(noised, t, pairs.prompt_per_side, target, pairs.masks)

    @property
    def t_per_side(self) -> Tensor:
        """Noise levels of the noised latents, (B * K,)."""
        return self.t.repeat_interleave(self.target.shape[1])


def noise_pairs(
    process: Process,
    pairs: Pairs,
    u: Tensor,
    *,
    masked: bool = False,
    mask_dilation: int = 0,
    noise: Tensor | None = None,
) -> NoisedPairs:
    """Add noise to all sides of each pair: one level and, if no other is given, one noise per pair.

    Args:
        process: The noise process.
        pairs: B pairs; the noise is drawn from their seeds.
        u: Quantiles of their noise levels, (B,) float64 on the CPU, so that the levels are the same
            to the last bit on every device.
        masked: Whether errors count only inside a pair's mask, if it has one.
        mask_dilation: See `dilate`.
        noise: Noise of each side, (B, K, C, H, W).
    """
    channels, height, width = pairs.latents.shape[2:]
    shape, device = (channels, height, width), pairs.latents.device
    t = to_device(process.draw_levels(u, shape), device)
    masks = dilate(pairs.masks, mask_dilation) if masked and pairs.masks is not None else None
    if noise is None:  # the same on all sides: its variance cancels in their difference
        noise = draws.normal(pairs.seeds, shape, "noise", device)
    return NoisedPairs.from_pairs(process, pairs._replace(masks=masks), t, noise)


def dilate(masks: Tensor, by: int) -> Tensor:
    """Return masks dilated by a square: the largest value within so many positions, (B, 1, H, W).

    Args:
        masks: Masks at the latents' size, (B, 1, H, W).
        by: Positions in each direction, those of latents: usually 8 pixels each.
    """
    return torch.nn.functional.max_pool2d(masks, 2 * by + 1, stride=1, padding=by)


class DenoisingErrors(NamedTuple):
    """Mean squared errors of the denoiser, and their overlap with the chosen side's."""

    value: Tensor  # (B, K) float32: squared residual of each side, mean over C, H, W
    overlap: Tensor  # (B, K) float32: mean product of each side's residual and the chosen side's


def denoising_errors(
    prediction: Tensor, target: Tensor, masks: Tensor | None = None
) -> DenoisingErrors:
    """Return the mean squared error of every side, in float32.

    Args:
        prediction: Prediction of the denoiser, (B, K, C, H, W).
        target: Target of the prediction, (B, K, C, H, W).
        masks: Weight of each position, (B, 1, H, W); the mean is weighted by it.
    """
    residual = prediction.float() - target.float()
    if masks is not None:
        weight = masks[:, None] / masks[:, None].mean((-2, -1), keepdim=True).clamp(min=1e-6)
        residual = residual * weight.sqrt()
    detached = residual.detach()
    return DenoisingErrors(
        residual.square().mean((2, 3, 4)), (detached * detached[:, :1]).mean((2, 3, 4))
    )


def predict_sides(backbone: Backbone, noised: NoisedPairs) -> Tensor:
    """Return the predictions of the active network, all sides in one forward, (B, K, C, H, W)."""
    prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    return prediction.unflatten(0, noised.target.shape[:2])


def predict_errors(backbone: Backbone, noised: NoisedPairs) -> DenoisingErrors:
    """Return the denoising errors of the active network, all sides in one forward."""
    return denoising_errors(predict_sides(backbone, noised), noised.target, noised.masks)


def error_log_ratios(policy: Tensor, reference: Tensor | None) -> Tensor:
    """Return half the drop in error from reference to policy, (B, K).

    It estimates log policy(x) / reference(x) up to a constant factor of beta (Diffusion-DPO, arXiv
    2311.12908, Eq. 14; the 1/2 is in the released code). Without a reference it is minus half the
    policy's error.
    """
    zero = torch.zeros_like(policy) if reference is None else reference
    return 0.5 * (zero - policy)


def weigh(ratios: LogRatios, weight: Tensor) -> LogRatios:
    """Return log-ratios and errors multiplied by the weight of their noise level.

    Args:
        ratios: Log-ratios of B pairs.
        weight: Factor of each pair's squared errors, (B,), such as `error_weight` of a process.
    """
    parts = {name: part for name, part in ratios._asdict().items() if name != "t"}
    known = {name: part for name, part in parts.items() if part is not None}
    return ratios._replace(**{name: weight[:, None] * part for name, part in known.items()})
