"""Losses of methods with a reward: pure functions of scores, ratios and predictions.

Scores become advantages, relative to the other images of their prompt; a policy gradient weighs
ratios of densities by them, DiffusionNFT weighs two denoising errors.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Deviation = Literal["group", "global"]
"""Whose standard deviation divides an advantage: its prompt's, or that of all prompts."""

LIMIT = 5.0
"""Largest advantage, as in the released code of DDPO, Flow-GRPO and DiffusionNFT."""

LEAST = 1e-4
"""Added to the standard deviation, as in the same code."""

TANGENT = 5.0
"""Log-ratio from which a ratio goes on along its tangent, so that its gradient stays finite."""


def apart(scores: Tensor) -> Tensor:
    """Return 1 for prompts whose scores differ, 0 where all are equal, (B,) float32.

    Args:
        scores: Scores of the M images of each prompt, (B, M).
    """
    return (scores.amax(1) > scores.amin(1)).float()


def centred(scores: Tensor) -> Tensor:
    """Return scores minus the mean of their prompt, (B, M) float64; 0 where all are equal.

    Args:
        scores: Scores of the M images of each prompt, (B, M).
    """
    values = scores.double()
    return (values - values.mean(1, keepdim=True)) * apart(scores)[:, None]


def group_advantages(scores: Tensor, deviation: Tensor | None = None) -> Tensor:
    """Return advantages within each prompt's group, (B, M) float32 in [-5, 5].

    They are the scores minus the group's mean over a standard deviation (DeepSeekMath, arXiv
    2402.03300, as in Flow-GRPO, arXiv 2505.05470). A group whose scores are all equal has 0.

    Args:
        scores: Scores of the M images of each prompt, (B, M).
        deviation: Standard deviation, (); each group's own if not given.
    """
    own = scores.double().std(1, correction=0, keepdim=True) if deviation is None else deviation
    return (centred(scores) / (own + LEAST)).clamp(-LIMIT, LIMIT).float()


def ratio(log_ratios: Tensor) -> Tensor:
    """Return exp of log-ratios of any shape; above e^5 along the tangent, with a finite gradient.

    Ratios of means over channels and pixels are within a thousandth of 1: only a run that has
    gone astray reaches the tangent.
    """
    over = (log_ratios - TANGENT).clamp(min=0)
    return log_ratios.clamp(max=TANGENT).exp() + math.exp(TANGENT) * over


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, eps: float) -> Tensor:
    """Return max(-A r, -A clip(r, 1 - eps, 1 + eps)), the loss of PPO (arXiv 1707.06347, Eq. 7).

    Clipped are ratios that have moved the way of their advantage; the others keep their gradient.

    Args:
        log_ratios: Log-ratio r of policy to old policy, (B, K, S).
        advantages: A, (B, K).
        eps: Range of the ratios around 1.

    Returns:
        (B, K, S).
    """
    above, below = math.log1p(eps), math.log1p(-eps)
    sign = advantages[..., None]
    kept = torch.where(sign > 0, log_ratios.clamp(max=above), log_ratios.clamp(min=below))
    return -sign * ratio(kept)


def masked_surrogate(
    log_ratios: Tensor, advantages: Tensor, divergence: Tensor, limit: float
) -> Tensor:
    """Return -A r, without the steps that leave a trust region: DPPO's loss.

    A step is dropped if its divergence from the old policy is above the limit and its ratio has
    moved the way of its advantage, further away.

    Args:
        log_ratios: Log-ratio r of policy to old policy, (B, K, S).
        advantages: A, (B, K).
        divergence: KL divergence of policy and old policy, (B, K, S).
        limit: Largest divergence.

    Returns:
        (B, K, S).
    """
    sign = advantages[..., None]
    away = (divergence > limit) & (sign * log_ratios > 0)
    return -sign * ratio(log_ratios) * ~away


def relative_error(clean: Tensor, latents: Tensor) -> Tensor:
    """Return the mean squared error over the mean absolute error, which is held constant, (B, K).

    The gradient is then about as large at every noise level (as in DMD, arXiv 2311.18828).

    Args:
        clean: Predicted clean latents, (B, K, C, H, W) float32.
        latents: Clean latents, (B, K, C, H, W).
    """
    residual = clean - latents.float()
    scale = residual.detach().abs().mean((2, 3, 4)).clamp(min=1e-5)
    return residual.square().mean((2, 3, 4)) / scale


def contrasted_errors(
    clean: Tensor, old: Tensor, latents: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the errors of DiffusionNFT's positive and negative policy, each (B, K).

    The positive policy is beta of the way from the old to the new prediction, and beyond it for
    beta above 1; the negative one is as far on the other side (arXiv 2509.16117). Clean latents are
    linear in velocity, noise or v, so that this is the mixture of either.

    Args:
        clean: The policy's prediction of the clean latents, (B, K, C, H, W) float32.
        old: That of the sampling policy, (B, K, C, H, W) float32.
        latents: Clean latents, (B, K, C, H, W).
        beta: Strength of the guidance; the smaller, the further a step goes.
    """
    change = beta * (clean - old)
    return relative_error(old + change, latents), relative_error(old - change, latents)


def contrasted_loss(positive: Tensor, negative: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """Return DiffusionNFT's loss, 5 / beta times the errors by the probability of being good.

    Args:
        positive: Error of the positive policy, (B, K).
        negative: Error of the negative policy, (B, K).
        advantages: In [-5, 5], (B, K); the probability is 0.5 at 0 and reaches 0 and 1 at the ends.
        beta: As in `contrasted_errors`.

    Returns:
        (B, K).
    """
    good = (advantages / (2 * LIMIT) + 0.5).clamp(0, 1)
    return LIMIT / beta * (good * positive + (1 - good) * negative)
