"""CaPO: calibrated preference optimisation, rewards as regression targets (arXiv 2502.02588)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.denoising import weigh
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons, win_rates
from lit_prefopt.pairwise import PairwiseModule, require_scores


class CaPO(PairwiseModule):
    """Regresses beta times the difference of log-ratios to the difference of calibrated rewards.

    A calibrated reward is the mean probability that an image is preferred to the others of its
    prompt. The pairs need scores: those of `RankedSamples` with `calibrate: true` are calibrated
    over all images of a prompt, in place of the paper's average over judges too, and `pairs:
    pareto` takes them from the Pareto fronts. Labels have no effect. It is defined on denoising
    errors, those of flow models as well.

    Args:
        beta: Factor of the log-ratios, on mean errors with the factor 1/2 as in Diffusion-DPO. The
            loss is beta^2 times IPO's where the rewards differ by 1/2.
        calibrated: Whether the scores are calibrated rewards, from 0 to 1; else these are computed
            from the sides of each pair.
        score_scale: Factor of scores that are not calibrated, before the sigmoid of their
            difference.
        level_bias: Weigh the errors by sigmoid(bias - log SNR), which counts clean levels less; no
            weight if not given. The paper has such a weight; its bias is not known.
    """

    needs_known = ("scores",)

    def __init__(
        self,
        *args: Any,
        beta: float,
        calibrated: bool = False,
        score_scale: float = 1.0,
        level_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        check_number("score_scale", score_scale, above=0)
        check_number("level_bias", level_bias, optional=True)
        self.beta, self.calibrated = beta, calibrated
        self.score_scale, self.level_bias = score_scale, level_bias

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to reference for each side, weighted by noise level."""
        require_scores(pairs, "CaPO")
        ratios = super().log_ratios(pairs)
        if self.level_bias is None:
            return ratios
        process = self.backbone.process
        noise, image = (process.error_weight(ratios.t, of) for of in ("noise", "image"))
        return weigh(ratios, sigmoid_weight(noise, image, self.level_bias))

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the squared difference of margin and difference of rewards, (B,)."""
        rewards = require_scores(pairs, "CaPO")
        if not self.calibrated:
            rewards = win_rates(self.score_scale * rewards)
        return (rewards[:, 0] - rewards[:, -1] - ratios.margin(self.beta)).square()


def sigmoid_weight(noise: Tensor, image: Tensor, bias: float) -> Tensor:
    """Return sigmoid(bias - log SNR) of noise levels, (B,); finite at pure noise.

    Args:
        noise: Factors of noise errors at these levels, (B,); with those of the image, the SNR.
        image: Factors of image errors.
        bias: Log SNR at which the weight is one half.
    """
    log_snr = noise.log() - image.log()
    return (bias - log_snr).sigmoid()
