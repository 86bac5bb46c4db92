"""D3PO: direct preference for denoising diffusion policy optimisation (arXiv 2311.13231, 2023)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import LogRatios, Pairs, Steps
from lit_prefopt.errors import check_number
from lit_prefopt.judges import Judge
from lit_prefopt.losses import clip, preference_loss
from lit_prefopt.methods.dense_reward import DenseRewardDPO
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.processes.settings import Sampling


class D3PO(DenseRewardDPO):
    """Says of every step of a trajectory what the judge said of its last image.

    It is `DenseRewardDPO` with all steps alike, and with a sigmoid for each step instead of one
    around their mean.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        judge: Scores the last images.
        beta: Pull to the reference, on log-densities that are means over channels and pixels.
        eps: Ratios are clipped to [1 - eps, 1 + eps], step by step.
        drawn_steps: Steps drawn from a trajectory for one update, with replacement; the released
            code goes through all of them one by one.
        sampling: How it rolls out; eta must be above 0.
        trajectories: Roll-outs of each prompt; any two of them are a pair.
        states: Precision of the kept states, to which the roll-out rounds each of them.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        judge: Judge,
        beta: float,
        eps: float,
        drawn_steps: int,
        sampling: Sampling,
        trajectories: int,
        states: Literal["float32", "bfloat16", "float16"] = "float32",
        validation_draws: int = 4,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            judge,
            beta,
            delta=eps,
            gamma=1.0,
            drawn_steps=drawn_steps,
            sampling=sampling,
            trajectories=trajectories,
            kept=trajectories,
            states=states,
            validation_draws=validation_draws,
        )
        check_number("eps", eps, most=0.999, above=0)
        self.eps = eps

    def losses(self, ratios: LogRatios, pairs: Pairs | Steps) -> Tensor:  # type: ignore[override]
        """Return the sigmoid loss of the clipped ratios, mean over the steps, (B,)."""
        clipped = self.clipped(ratios.values)
        difference = clipped[:, 0] - clipped[:, -1]
        labels = pairs.labels[:, None].expand_as(difference)
        return preference_loss(difference, labels, self.beta).mean(1)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Return the log-ratios (B, K, S) of ratios clipped to [1 - eps, 1 + eps]."""
        return clip(log_ratios, self.eps)
