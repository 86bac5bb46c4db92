"""Base class of the methods that compare the chosen with the rejected side of stored pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.denoising import discounted, weigh
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons, rejected_gradient_scale, scale_gradient
from lit_prefopt.module import PreferenceDiffusionModule


class PairwiseModule(PreferenceDiffusionModule):
    """Compares two sides of a pair by their denoising errors, with the options that all share.

    A subclass implements `pair_losses`. Of a list of more than two sides, the first and the last
    are compared.

    Args:
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

    def __init__(
        self,
        *args: Any,
        anchor: float = 0.0,
        chosen_protection: float | None = None,
        gamma: float = 1.0,
        gamma_steps: int = 50,
        weighting: Literal["noise", "velocity", "image"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("anchor", anchor, 0)
        check_number("chosen_protection", chosen_protection, 0, optional=True)
        check_number("gamma", gamma, most=1, above=0)
        check_number("gamma_steps", gamma_steps, 1)
        self.anchor = anchor
        self.chosen_protection = chosen_protection
        self.gamma, self.gamma_steps = gamma, gamma_steps
        self.weighting = weighting

    def level_quantiles(self, u: Tensor) -> Tensor:
        """Return discounted quantiles, (B,)."""
        return discounted(u, self.gamma, self.gamma_steps)

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to reference for each side, weighted by noise level."""
        return self.weighted(super().log_ratios(pairs))

    def weighted(self, ratios: LogRatios) -> LogRatios:
        """Return log-ratios and errors with the factor of `weighting`.

        Errors of policy and reference have the same weight, so a table of the reference's errors
        serves every `weighting`.
        """
        if self.weighting is None:
            return ratios
        return weigh(ratios, self.backbone.process.error_weight(ratios.t, self.weighting))

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the loss of each pair, (B,), with the gradient of `chosen_protection`."""
        losses = self.pair_losses(self.protected(ratios), pairs)
        if self.anchor:
            losses = losses + self.anchor * ratios.require("policy_error", "`anchor`")[:, 0]
        return losses

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the loss of each pair, (B,), without the options that all methods share.

        Args:
            ratios: Log-ratios and errors of the pairs' sides.
            pairs: The pairs, for their labels.
        """
        raise NotImplementedError

    def protected(self, ratios: LogRatios) -> LogRatios:
        """Return the log-ratios and errors, with the rejected side's gradient scaled."""
        if self.chosen_protection is None:
            return ratios
        errors = ratios.require("policy_error", "`chosen_protection`")
        overlap = ratios.require("overlap", "`chosen_protection`")
        factor = torch.ones_like(errors)
        factor[:, -1] = rejected_gradient_scale(
            errors[:, 0], overlap[:, -1], self.chosen_protection
        )
        return ratios._replace(
            values=scale_gradient(ratios.values, factor),
            policy_error=scale_gradient(errors, factor),
        )


def require_scores(pairs: Comparisons, needed_by: str) -> Tensor:
    """Return the scores of the pairs' sides, (B, K).

    Args:
        pairs: The pairs.
        needed_by: Method that needs them, for the message.

    Raises:
        InputError: The pairs have no scores.
    """
    scores: Tensor | None = getattr(pairs, "scores", None)
    if scores is None:
        raise InputError(
            f"{needed_by} needs a score of each side, which these pairs do not have: generate "
            "scored pairs (`lit-prefopt predict --config sd15-ranked`), give `scores` to `shards "
            "convert`, or take DiffusionDPO."
        )
    return scores
