"""Deterministic inversion (DDIM, Euler): compute the noise that the policy maps to an image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion import draws

Solver = Literal["euler", "trapezoid"]
"""Noise of a step: that predicted before it, or the mean of those before and after it."""


@torch.no_grad()
def invert(
    backbone: Backbone,
    pairs: Pairs,
    t: Tensor,
    steps: int,
    solver: Solver = "euler",
    eta: float = 0.0,
) -> Tensor:
    """Return the noise of each side, (B, K, C, H, W) float32, by inversion up to its noise level.

    Clean latents go to level t in equal steps by the predictions of the policy, without guidance.
    The noise that is returned is the one that makes of them, at level t, what they end as. All
    ranks take the same number of forwards.

    Args:
        backbone: Predicts as policy.
        pairs: B pairs of clean latents; random numbers are drawn from their seeds.
        t: Noise levels, (B,).
        steps: Number of steps from the clean level to t.
        solver: Noise of a step; `trapezoid` takes two forwards.
        eta: Random share of the noise of a step, in units of the deviation of DDPM's reverse step,
            in [0, 1]; the same draw for all sides. 0 is deterministic.
    """
    process, prompt, seeds = backbone.process, pairs.prompt_per_side, pairs.seeds
    start = pairs.latents.flatten(0, 1).double()
    latents, device, shape = start, start.device, pairs.latents.shape[2:]
    levels = [process.part_of(t, number / steps) for number in range(steps)] + [t]
    times = [level.repeat_interleave(pairs.sides) for level in levels]

    def predicted_noise(at: Tensor, level: Tensor) -> Tensor:
        prediction = backbone.predict(at.float(), level, prompt)
        return process.noise(prediction, at.float(), level).double()

    for number, (here, there) in enumerate(zip(times[:-1], times[1:], strict=True)):
        (signal, rest), (signal_next, rest_next) = process.factors(here), process.factors(there)
        noise = predicted_noise(latents, here)
        if solver == "trapezoid":
            trial = signal_next * (latents - rest * noise) / signal + rest_next * noise
            noise = (noise + predicted_noise(trial, there)) / 2
        image = (latents - rest * noise) / signal
        if eta:
            kept = 1 - (signal_next * rest / (rest_next * signal)).square()
            share = eta * rest / rest_next * kept.clamp(min=0).sqrt()
            drawn = draws.normal(seeds, shape, f"inversion {number}", device)
            drawn = drawn.repeat_interleave(pairs.sides, 0)
            noise = (1 - share.square()).sqrt() * noise + share * drawn
        latents = signal_next * image + rest_next * noise
    signal, rest = process.factors(times[-1])
    noise = (latents - signal * start) / rest
    # autocast caches the weights that it casts, here without gradients, for the forwards to come
    torch.clear_autocast_cache()
    return noise.float().unflatten(0, pairs.latents.shape[:2])
