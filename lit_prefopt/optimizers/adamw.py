"""AdamW with float32 moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lit_prefopt.errors import check_number
from lit_prefopt.optimizers.config import OptimizerConfig, check_moments


class AdamW(OptimizerConfig):
    """torch.optim.AdamW.

    Args:
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        fused: Update all weights in one kernel, in a quarter of the time on a CPU; the same step up
            to rounding.
    """

    def __init__(
        self,
        *args: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_moments(betas, weight_decay)
        check_number("eps", eps, 0)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.fused = fused

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build torch's AdamW."""
        optimizer = torch.optim.AdamW(
            parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=self.fused or None
        )
        # A fused AdamW can unscale float16 gradients itself, which Lightning cannot clip; without
        # this flag the scaler unscales them before, as for all other optimizers.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer
