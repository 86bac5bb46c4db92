"""Optimizers with 8-bit moments, by bitsandbytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lit_prefopt.errors import InputError, check_number
from lit_prefopt.optimizers.config import OptimizerConfig, check_moments
from lit_prefopt.optimizers.gradient_release import release_gradients
from lit_prefopt.optimizers.rounding import StochasticRounding

LEAST_SIZE = 65_536
"""Least number of elements of a tensor whose moments are stored in 8 bits."""


class EightBit(OptimizerConfig):
    """Base class of the optimizers of bitsandbytes; a subclass sets its number of moments.

    Args:
        betas: Decay rates.
        weight_decay: Decoupled weight decay.
        least_size: Tensors with fewer elements have moments in float32.
        paged: Move moments to the host while the GPU's memory is full.
        stochastic_rounding: Train bfloat16 weights (`--backbone.policy_dtype bfloat16`) with
            stochastic rounding, so that small updates are kept on average.
        release_gradients: Update each weight in the backward pass and release its gradient, which
            saves the memory of gradients; not with accumulation, clipping or several ranks.
    """

    MOMENTS: ClassVar[int]
    BLOCK = 256  # numbers that share a scale of 4 bytes

    def __init__(
        self,
        *args: Any,
        betas: tuple[float, float],
        weight_decay: float = 1e-2,
        least_size: int = LEAST_SIZE,
        paged: bool = False,
        stochastic_rounding: bool = False,
        release_gradients: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_moments(betas, weight_decay)
        check_number("least_size", least_size, 0)
        self.betas, self.weight_decay = betas, weight_decay
        self.least_size = least_size
        self.options = {"min_8bit_size": least_size, "is_paged": paged}
        self.supports_bf16_weights, self.releases = stochastic_rounding, release_gradients

    def state_bytes(self, parameter: nn.Parameter) -> int:
        """Return the bytes of a parameter's moments, with the scales of 8-bit ones."""
        size = parameter.numel()
        quantized = size + 4 * -(-size // self.BLOCK)
        return self.MOMENTS * (4 * size if size < self.least_size else quantized)

    def stepping(self, optimizer: Any) -> Optimizer:
        """Add stochastic rounding and gradient release to an optimizer of bitsandbytes, if set."""
        if self.supports_bf16_weights:
            optimizer.update_step = StochasticRounding(optimizer)
        if self.releases:
            release_gradients(optimizer)
        return optimizer  # type: ignore[no-any-return]


class AdamW8bit(EightBit):
    """AdamW with 8-bit moments, quantized block by block (bitsandbytes, arXiv 2110.02861).

    The two moments of a weight take 2 bytes instead of 8. Those of small tensors, which would save
    little, stay in float32: as a rule norms, biases and LoRAs.

    Args:
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
    """

    MOMENTS = 2

    def __init__(
        self,
        *args: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, betas=betas, **kwargs)
        check_number("eps", eps, 0)
        self.eps = eps

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build bitsandbytes' AdamW8bit."""
        adam = _bitsandbytes().AdamW8bit
        return self.stepping(
            adam(parameters, self.lr, self.betas, self.eps, self.weight_decay, **self.options)
        )


class Lion8bit(EightBit):
    """Lion (arXiv 2302.06675) with its moment in 8 bits, quantized block by block (bitsandbytes).

    Its updates are signs: use a third to a tenth of AdamW's learning rate, and as much more weight
    decay.

    Args:
        betas: Decay rates of the update and of the moment.
    """

    MOMENTS = 1

    def __init__(self, *args: Any, betas: tuple[float, float] = (0.9, 0.99), **kwargs: Any) -> None:
        super().__init__(*args, betas=betas, **kwargs)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build bitsandbytes' Lion8bit."""
        lion = _bitsandbytes().Lion8bit
        return self.stepping(
            lion(parameters, self.lr, self.betas, self.weight_decay, **self.options)
        )


def _bitsandbytes() -> Any:
    """Return the optimizers of bitsandbytes, which is untyped."""
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise InputError(
            "8-bit optimizers need bitsandbytes: `pip install lit-prefopt[bitsandbytes]`, or take "
            "AdamW or Adafactor."
        ) from error
