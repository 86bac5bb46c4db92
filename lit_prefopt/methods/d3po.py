"""D3PO: direct preference for denoising diffusion policy optimisation (arXiv 2311.13231, 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_prefopt.batches import LogRatios
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons, clip, preference_loss
from lit_prefopt.methods.dense_reward import DenseRewardDPO


class D3PO(DenseRewardDPO):
    """Labels every step of a trajectory with the judge's preference for its last image.

    It is `DenseRewardDPO` with equal weights of all steps, and with a sigmoid loss per step instead
    of one of their mean. Tied pairs have weight 0, so their part of the loss is 0; in the mean that
    the released code logs each of them adds ln 2.

    Args:
        beta: Strength of the regularisation to the reference, on log-densities that are means over
            channels and pixels.
        eps: Ratios are clipped to [1 - eps, 1 + eps], step by step.
        drawn_steps: Steps drawn from a trajectory for one update, with replacement; the released
            code trains on all of them one by one.
        trajectories: Roll-outs of each prompt; any two of them are a pair.
    """

    def __init__(
        self,
        *args: Any,
        beta: float,
        eps: float,
        drawn_steps: int,
        trajectories: int,
        **kwargs: Any,
    ) -> None:
        check_number("eps", eps, most=0.999, above=0)
        check_number("trajectories", trajectories, 2)
        super().__init__(
            *args,
            beta=beta,
            delta=eps,
            gamma=1.0,
            drawn_steps=drawn_steps,
            trajectories=trajectories,
            kept=trajectories,
            sides=2,
            **kwargs,
        )
        self.eps = eps

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the sigmoid loss of the clipped ratios, mean over the steps, (B,)."""
        clipped = self.clipped(ratios.values)
        difference = clipped[:, 0] - clipped[:, -1]
        labels = pairs.labels[:, None].expand_as(difference)
        return preference_loss(difference, labels, self.beta).mean(1)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Clip ratios to [1 - eps, 1 + eps], given and returned as log-ratios (B, K, S)."""
        return clip(log_ratios, self.eps)
