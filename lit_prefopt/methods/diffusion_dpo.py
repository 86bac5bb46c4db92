"""Diffusion-DPO: direct preference optimisation of diffusion models (arXiv 2311.12908, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.denoising import discounted, weigh
from lit_prefopt.errors import check_number
from lit_prefopt.losses import (
    Comparisons,
    preference_loss,
    rejected_gradient_scale,
    scale_gradient,
    sigmoid,
    smooth,
)
from lit_prefopt.module import PreferenceDiffusionModule


class DiffusionDPO(PreferenceDiffusionModule):
    """Increases the margin between chosen and rejected side, regularised to the reference.

    Args:
        beta: Strength of the regularisation to the reference, on mean errors with the factor 1/2 of
            the released code.
        link: Loss of a difference of log-ratios: `lit_prefopt.losses.sigmoid`, `.ipo`, `.hinge`,
            or any function of that form.
        label_smoothing: Share of the labels that are assumed to be wrong.
        anchor: Weight of the chosen side's denoising error, added to the loss.
        chosen_protection: Scale the rejected side's gradient so that the chosen side's error does
            not rise, and keeps at least this share of its decrease (mu of Diffusion-SDPO, arXiv
            2511.03317); off if not given.
        gamma: Weight of a noise level relative to one that is a `gamma_steps`-th of all levels
            noisier, in (0, 1]; below 1 noisy levels are drawn more often, in validation as well
            (the offline form of arXiv 2402.08265).
        gamma_steps: Number of parts of the noise levels that `gamma` refers to.
        weighting: Reading of the denoiser whose errors are compared, whatever it predicts:
            `noise`, `velocity` (noise minus image) or `image`. All errors are multiplied by the
            factor that turns them into errors of that reading; by default they are those of the
            denoiser's own prediction. `noise` carries Diffusion-DPO over to flow models (Flow-DPO),
            `velocity` weighs noisy levels more, `image` still more.
    """

    least_beta: float = 10.0
    """A smaller beta gets a warning: it belongs to log-ratios that are sums, not means."""

    def __init__(
        self,
        *args: Any,
        beta: float,
        link: Callable = sigmoid,
        label_smoothing: float = 0.0,
        anchor: float = 0.0,
        chosen_protection: float | None = None,
        gamma: float = 1.0,
        gamma_steps: int = 50,
        weighting: Literal["noise", "velocity", "image"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        check_number("label_smoothing", label_smoothing, 0, 1)
        check_number("anchor", anchor, 0)
        check_number("chosen_protection", chosen_protection, 0, optional=True)
        check_number("gamma", gamma, most=1, above=0)
        check_number("gamma_steps", gamma_steps, 1)
        self.beta = beta
        self.link = link
        self.label_smoothing = label_smoothing
        self.anchor = anchor
        self.chosen_protection = chosen_protection
        self.gamma, self.gamma_steps = gamma, gamma_steps
        self.weighting = weighting

    def on_train_start(self) -> None:
        """Warn of a beta that is too small for mean errors."""
        super().on_train_start()
        if self.beta < self.least_beta:
            rank_zero_warn(
                f"beta is {self.beta:g}, as for a language model, but errors are means here and "
                "not sums, so that nothing would hold the policy to the reference: published runs "
                "have 200 to 5000, such as `--model.beta 2000`."
            )

    def level_quantiles(self, u: Tensor) -> Tensor:
        """Return discounted quantiles, (B,)."""
        return discounted(u, self.gamma, self.gamma_steps)

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to reference for each side, weighted by noise level.

        Errors of policy and reference have the same weight, so a table of the reference's errors
        serves every `weighting`.
        """
        ratios = super().log_ratios(pairs)
        if self.weighting is None:
            return ratios
        return weigh(ratios, self.backbone.process.error_weight(ratios.t, self.weighting))

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the link's loss of each pair, (B,) (Eq. 14)."""
        chosen, rejected = ratios.chosen, ratios.rejected
        if self.chosen_protection is not None:
            errors = ratios.require("policy_error", "`chosen_protection`")
            overlap = ratios.require("overlap", "`chosen_protection`")
            scale = rejected_gradient_scale(errors[:, 0], overlap[:, -1], self.chosen_protection)
            rejected = scale_gradient(rejected, scale)
        labels = smooth(pairs.labels, self.label_smoothing)
        losses = preference_loss(chosen - rejected, labels, self.beta, self.link)
        if self.anchor:
            losses = losses + self.anchor * ratios.require("policy_error", "`anchor`")[:, 0]
        return losses
