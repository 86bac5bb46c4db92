"""Denoising errors and the log-ratios that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Errors(NamedTuple):
    """How far the denoiser was from its target, one value per side."""

    value: Tensor  # (B, K) float32: squared residual, mean over C, H, W
    overlap: Tensor  # (B, K) float32: mean product with the chosen side's residual


def denoising_errors(prediction: Tensor, target: Tensor, masks: Tensor | None = None) -> Errors:
    """Return the mean squared error of every side, in float32.

    Args:
        prediction: What the denoiser said, (B, K, C, H, W).
        target: What it should have said, (B, K, C, H, W).
        masks: Where the error counts, (B, 1, H, W); the mean is taken over that part alone.

    Returns:
        Errors (B, K) and their overlap with the chosen side (`losses.loser_scale`).
    """
    residual = prediction.float() - target.float()
    weight = torch.ones_like(residual[:, :1]) if masks is None else masks[:, None].expand_as(residual[:, :1])
    area = weight.sum((2, 3, 4)).clamp(min=1)
    value = (weight * residual.square()).sum((2, 3, 4)) / area
    detached = residual.detach()
    overlap = (weight * detached * detached[:, :1]).sum((2, 3, 4)) / area
    return Errors(value, overlap)


def error_log_ratios(policy: Tensor, reference: Tensor | None) -> Tensor:
    """Return half the drop in error from reference to policy, (B, K).

    It estimates log policy(x) / reference(x) up to a constant that beta takes up (Diffusion-DPO,
    arXiv 2311.12908, Eq. 14; the 1/2 stands in the released code). Without a reference it is
    minus half the policy's error.
    """
    return -0.5 * policy if reference is None else 0.5 * (reference - policy)
