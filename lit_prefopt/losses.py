"""Preference losses: pure functions of log-ratios, one value per pair.

They do not depend on where log-ratios come from. beta multiplies log-ratios whose denoising form
already holds the factor 1/2 of the released Diffusion-DPO code and a *mean* over C, H and W
(see `diffusion.denoising`), so published betas can be used unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Link = Callable[[Tensor, float], Tensor]
"""Maps the difference of two log-ratios (B,) and beta to a loss (B,)."""


class Comparisons(Protocol):
    """The fields of `Pairs` and `Steps` that losses and metrics use."""

    @property
    def seeds(self) -> Tensor:
        """Seeds of the pairs, (B,) int64."""

    @property
    def labels(self) -> Tensor:
        """Probability that the first side is the better one, (B,) float32."""

    @property
    def weights(self) -> Tensor:
        """Factor of each pair's loss before the mean, (B,) float32."""

    @property
    def sides(self) -> int:
        """Number of sides, K."""


def sigmoid(difference: Tensor, beta: float) -> Tensor:
    """Return DPO's loss: minus log sigmoid of beta times the difference.

    It is Eq. 7 of arXiv 2305.18290.

    Args:
        difference: Chosen minus rejected log-ratio, (B,).
        beta: Strength of the regularisation to the reference.
    """
    return -F.logsigmoid(beta * difference)


def ipo(difference: Tensor, beta: float) -> Tensor:
    """Return (difference - 1 / (2 beta))^2, the loss of IPO (arXiv 2310.12036, Eq. 17).

    Args:
        difference: Chosen minus rejected log-ratio, (B,).
        beta: Strength of the regularisation; the difference is regressed to 1 / (2 beta).
    """
    return (difference - 1 / (2 * beta)).square()


def hinge(difference: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - beta * difference), the loss of SLiC-HF (arXiv 2305.10425, Eq. 4).

    Args:
        difference: Chosen minus rejected log-ratio, (B,).
        beta: Strength of the regularisation; margins above 1 have no loss.
    """
    return F.relu(1 - beta * difference)


def kahneman_tversky(difference: Tensor, beta: float) -> Tensor:
    """Return 1 - sigmoid(beta * difference), the loss of KTO (arXiv 2402.01306, Eq. 7).

    It saturates on both sides: gains and losses far from the baseline count little more.

    Args:
        difference: Log-ratio over the baseline, (B,) or (B, K).
        beta: Strength of the regularisation to the reference.
    """
    return torch.sigmoid(-beta * difference)


def risk_seeking(difference: Tensor, beta: float) -> Tensor:
    """Return log sigmoid(-beta * difference): minus the convex utility of arXiv 2404.04465.

    It is not bounded below. The loss-averse utility of that paper is `sigmoid`.

    Args:
        difference: Log-ratio over the baseline, (B,) or (B, K).
        beta: Strength of the regularisation to the reference.
    """
    return F.logsigmoid(-beta * difference)


def preference_loss(
    difference: Tensor, labels: Tensor, beta: float, link: Link = sigmoid
) -> Tensor:
    """Return the link's loss in expectation over which side is the better one.

    Args:
        difference: Chosen minus rejected log-ratio, (B,).
        labels: Probability that the chosen side is the better one, (B,); 1 for a plain pair.
        beta: Strength of the regularisation to the reference.
        link: `sigmoid`, `ipo`, `hinge`, or any function of the same form.

    Returns:
        One value per pair, (B,).
    """
    return labels * link(difference, beta) + (1 - labels) * link(-difference, beta)


def bernoulli_function(x: Tensor) -> Tensor:
    """Return x / (exp(x) - 1), elementwise: 1 at 0, falling to 0; of MaPO (arXiv 2406.06424).

    Value and gradient are finite and accurate at 0, where the formula is 0 / 0, and at large x,
    where exp(x) overflows.

    Args:
        x: At least 0, of any shape.
    """
    small = x < 0.1
    square = x.clamp(max=0.1).square()
    series = 1 - x.clamp(max=0.1) / 2 + square / 12 * (1 - square / 60 * (1 - square / 42))
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, series, safe * (-safe).exp() / -(-safe).expm1())


def plackett_luce(utilities: Tensor) -> Tensor:
    """Return minus the log-probability of an order (R. Plackett, 1975; R. D. Luce, 1959).

    The best side is chosen among all, the second among the others, and so on, each time by a
    softmax. Of two sides it is the sigmoid loss of their difference.

    Args:
        utilities: In that order, the best first, (B, K).

    Returns:
        One value per row, (B,).
    """
    among = utilities.flip(1).logcumsumexp(1).flip(1)
    return (among - utilities).sum(1)


def discounted_gains(preferred: Tensor) -> Tensor:
    """Return the weight of each pair of a ranked list, by gain and discount as in DCG.

    Of the images i and j it is |2^p_i - 2^p_j| |1 / log(1 + i) - 1 / log(1 + j)|, with ranks from 1
    (arXiv 2410.18013, Eq. 6).

    Args:
        preferred: Probability that an image is preferred to another one of its list, best image
            first, (B, K).

    Returns:
        A symmetric matrix for each list, (B, K, K), with zeros for images that are equally good.
    """
    gains = preferred.exp2()
    ranks = torch.arange(1, preferred.shape[1] + 1, device=preferred.device, dtype=gains.dtype)
    discounts = 1 / ranks.log1p()
    apart = (gains[:, :, None] - gains[:, None]).abs()
    return apart * (discounts[:, None] - discounts).abs()


def choice_divergence(difference: Tensor, labels: Tensor) -> Tensor:
    """Return how far a choice between two is from its label, in nats: KL(label || choice).

    It is the two-way cross entropy less the label's own entropy: so a tie costs nothing where the
    two scores are equal, and a step-aware judge is trained by it (arXiv 2406.04314).

    Args:
        difference: The first side's score minus the second's, (B,); the choice is its sigmoid.
        labels: Probability that the first side is the better one, (B,).

    Returns:
        One value per pair, (B,).
    """
    entropy = -torch.xlogy(labels, labels) - torch.xlogy(1 - labels, 1 - labels)
    return preference_loss(difference, labels, 1.0) - entropy


def win_rates(scores: Tensor) -> Tensor:
    """Return each side's mean probability of being preferred to another side, (B, K).

    It is the mean over the other sides of sigmoid(difference of the scores): the calibrated reward
    of CaPO (arXiv 2502.02588).

    Args:
        scores: Scores of the sides, (B, K), K at least 2.
    """
    wins = torch.sigmoid(scores[:, :, None] - scores[:, None])
    return (wins.sum(2) - 0.5) / (scores.shape[1] - 1)  # a side against itself is one half


def smooth(labels: Tensor, smoothing: float) -> Tensor:
    """Return labels smoothed towards one half, by the share of labels assumed to be wrong.

    This is conservative DPO (E. Mitchell, "A note on DPO with noisy preferences", 2023, Eq. 3).
    """
    return labels * (1 - smoothing) + (1 - labels) * smoothing


def rejected_gradient_scale(chosen_error: Tensor, overlap: Tensor, mu: float) -> Tensor:
    """Return the scale of the rejected gradient that keeps the chosen error from rising.

    With it, a step along the gradient in output space does not raise the chosen side's error, to
    first order (Diffusion-SDPO, arXiv 2511.03317): min(1, (1 - mu) |g_w|^2 / <g_w, g_l>) where
    the two gradients point the same way, else 1.

    Args:
        chosen_error: The policy's error on the chosen side, (B,): |g_w|^2 up to a constant.
        overlap: Mean product of both sides' residuals, (B,): <g_w, g_l> up to the same constant.
        mu: Share of the chosen side's progress that is kept at least, in [0, 1].
    """
    safe = (1 - mu) * chosen_error / overlap.clamp(min=torch.finfo(overlap.dtype).tiny)
    return torch.where(overlap > 0, safe.clamp(max=1), torch.ones_like(safe)).detach()


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return the values unchanged, with their gradient multiplied by the factor."""
    return values.detach() + factor * (values - values.detach())


def clip(log_ratios: Tensor, eps: float) -> Tensor:
    """Clip ratios to [1 - eps, 1 + eps] in log space.

    exp, clamp and log would give NaN gradients at large ratios.
    """
    return log_ratios.clamp(math.log1p(-eps), math.log1p(eps))
