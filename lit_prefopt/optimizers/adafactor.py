"""Adafactor, with factored second moments that take little memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import optimization

from lit_prefopt.optimizers.config import OptimizerConfig


class Adafactor(OptimizerConfig):
    """Adafactor (arXiv 1804.04235) with an absolute learning rate, not scaled by the weights.

    Its second moments are stored by row and column, which saves memory in a full fine-tune.

    Args:
        clip_threshold: Largest root mean square of an update before the learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        *args: Any,
        clip_threshold: float = 1.0,
        weight_decay: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.clip_threshold, self.weight_decay = clip_threshold, weight_decay

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build transformers' Adafactor."""
        return optimization.Adafactor(
            parameters,
            self.lr,
            clip_threshold=self.clip_threshold,
            weight_decay=self.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )

    def state_bytes(self, parameter: nn.Parameter) -> int:
        """Return the bytes of the second moments by row and by column, in float32."""
        size, shape = parameter.numel(), parameter.shape
        if len(shape) < 2:
            return 4 * size
        return 4 * (size // shape[-1] + size // shape[-2])
