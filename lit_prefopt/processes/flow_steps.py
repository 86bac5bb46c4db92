"""Stochastic reverse steps of a rectified flow that keep its marginal distributions.

At level sigma the network's reading of the noise is n = x + (1 - sigma) v, and the score of the
marginal density is -n / sigma. A diffusion with coefficient g spreads the density by g^2 / 2 times
its Laplacian; in the Fokker-Planck equation a drift of g^2 / 2 times the score, along the direction
of sampling, takes exactly that back. So for every g the marginals of dx = v dsigma, from noise to
image, are also those of

    dx = (v + g^2 n / (2 sigma)) dsigma + g sqrt(-dsigma) z,    dsigma < 0, z ~ N(0, 1).

- `flow` (Flow-GRPO, arXiv 2505.05470): g = eta sqrt(sigma / (1 - sigma)), with the next level in
  the denominator where sigma is 1.
- `dance` (DanceGRPO, arXiv 2505.07818): g = eta. The released code adds -eta^2 / 2 times the score
  times dsigma, which is the term above, sign and all; some copies of it end the statement of the
  log-density before its constants.
- `cps` (arXiv 2509.05952) discretises no equation: it is the flow's own combination of image and
  noise at the next level, a part of whose noise is new: s = sigma_next sin(eta pi / 2), the rest
  of the old noise having sqrt(sigma_next^2 - s^2). The released code has minus the squared distance
  in place of the log-density, so that a step to level 0 without noise is finite; here that step has
  a density, with the noise of level `LAST` in place of 0.

How well samples keep the marginals, with the exact velocity of a Gaussian: `flow` and `dance` are
Euler steps of the equation, whose error falls as 1 / steps, but for the first step of `flow`, from
pure noise: it raises the variance by about eta^4 / 4 however many steps there are, which is
forgotten on the way to the image. `cps` keeps the marginals of point data exactly; of data that
cannot be predicted from noised data it loses variance at every step, the more steps, the more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_prefopt.processes.settings import Sampling

LAST = 1e-3
"""Level whose noise the last step of `cps` adds, the cleanest of 1000 unshifted ones."""


def flow_step(
    velocity: Tensor, latents: Tensor, t: Tensor, t_next: Tensor, how: Sampling
) -> tuple[Tensor, Tensor]:
    """Return mean (B, C, H, W) and deviation (B, 1, 1, 1) of a stochastic step, float32.

    Args:
        velocity: Predicted velocity, (B, C, H, W) float32.
        latents: (B, C, H, W) float32.
        t: Levels sigma, (B,) float64.
        t_next: Less noisy ones, (B,) float64; 0 is the last.
        how: Settings with `eta` and `stochastic`.
    """
    here, there = (level.double().view(-1, 1, 1, 1) for level in (t, t_next))
    noise = latents + (1 - here).float() * velocity
    if how.stochastic == "cps":
        new = math.sin(how.eta * math.pi / 2)
        clean = latents - here.float() * velocity
        kept = there * math.sqrt(1 - new**2)
        mean = (1 - there).float() * clean + kept.float() * noise
        return mean, (new * there.clamp(min=LAST)).float()
    g = torch.full_like(here, how.eta)
    if how.stochastic == "flow":
        g = g * (here / (1 - torch.where(here == 1, there, here))).sqrt()
    drift = velocity + (g.square() / (2 * here)).float() * noise
    # the difference of float32 levels is that of the stock Euler step, to the last bit
    change = there.float() - here.float()
    return latents + change * drift, (g * (here - there).sqrt()).float()
