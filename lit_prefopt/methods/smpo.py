"""SmPO-Diffusion: smoothed preferences and trapezoidal inversion (arXiv 2506.02698, 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import Batch, LogRatios, Pairs
from lit_prefopt.diffusion.inversion import Solver
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons, preference_loss, smooth
from lit_prefopt.methods.inpo import InPO
from lit_prefopt.pairwise import require_scores


class SmPO(InPO):
    """Diffusion-DPO at inverted noise, with a beta of each pair by how sure its preference is.

    The pairs need scores. With p the probability that the chosen side is preferred, the sigmoid of
    the difference of the scores as shares of `score_range`, beta is multiplied by `smoothing_scale`
    times 2 p - 1. Where the scores contradict the label, the side with the higher score is
    preferred, as released; held-out pairs are measured by their labels. Each inversion step
    averages the noise that is predicted before and after it, so that it takes two forwards.

    Args:
        inversion_steps: Steps from the image to its noise level.
        inversion_eta: Random share of the noise of each step, in units of the deviation of DDPM's
            reverse step, in [0, 1]; released without.
        smoothing_scale: Factor of beta for a pair of certain preference.
        score_range: Lowest and highest score of the judge, which become 0 and 1: by default those
            of `PickScore`, 100 times the cosines 0.1154 and 0.2820 of the released code.
    """

    SOLVER: Solver = "trapezoid"

    needs_known = ("scores",)

    def __init__(
        self,
        *args: Any,
        inversion_steps: int = 5,
        inversion_eta: float = 0.0,
        smoothing_scale: float = 10.0,
        score_range: tuple[float, float] = (11.54, 28.20),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, inversion_steps=inversion_steps, inversion_eta=inversion_eta, **kwargs
        )
        check_number("smoothing_scale", smoothing_scale, above=0)
        lowest, highest = score_range
        if not lowest < highest:
            raise InputError(
                f"score_range is {lowest:g} to {highest:g}: give the judge's lowest and highest "
                "score, in this order."
            )
        self.smoothing_scale, self.score_range = smoothing_scale, score_range

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return the pairs to train on, in training with the side of the higher score first."""
        pairs = super().form_pairs(batch)
        scores = require_scores(pairs, "SmPO")
        if not self.training:
            return pairs
        swapped = scores[:, 0] < scores[:, -1]

        def ordered(sides: Tensor) -> Tensor:
            rows = swapped.to(sides.device).view(-1, *[1] * (sides.ndim - 1))
            return torch.where(rows, sides.flip(1), sides)

        return pairs._replace(
            latents=ordered(pairs.latents),
            scores=ordered(scores),
            frames=None if pairs.frames is None else ordered(pairs.frames),
            noise_seeds=None if pairs.noise_seeds is None else ordered(pairs.noise_seeds),
        )

    def certainty(self, pairs: Comparisons) -> Tensor:
        """Return 2 p - 1 of each pair, (B,), below 0 where the scores contradict the label."""
        scores = require_scores(pairs, "SmPO")
        lowest, highest = self.score_range
        return torch.tanh((scores[:, 0] - scores[:, -1]) / (highest - lowest) / 2)

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the link's loss of each pair at its own beta, (B,)."""
        difference = self.smoothing_scale * self.certainty(pairs) * ratios.margin(1.0)
        labels = smooth(pairs.labels, self.label_smoothing)
        return preference_loss(difference, labels, self.beta, self.link)
