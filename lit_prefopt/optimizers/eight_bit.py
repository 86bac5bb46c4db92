"""Optimizers whose moments are kept in 8 bits, by bitsandbytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lit_prefopt.errors import InputError, check_number
from lit_prefopt.optimizers.config import OptimizerConfig, ScheduleName, check_moments
from lit_prefopt.optimizers.gradient_release import release_gradients
from lit_prefopt.optimizers.rounding import StochasticRounding

LEAST_SIZE = 65_536
"""Elements from which on a tensor's moments are kept in 8 bits."""


class EightBit(OptimizerConfig):
    """What the optimizers of bitsandbytes share; a subclass says how many moments it keeps.

    Args:
        lr: Learning rate after the warm-up.
        betas: Decay rates.
        weight_decay: Decoupled weight decay.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
        least_size: Tensors with fewer elements keep their moments in float32.
        paged: Let a GPU that is full move moments to the host for the time being.
        stochastic_rounding: Learn weights of bfloat16, see `--backbone.policy_dtype`: each step is
            rounded at random, so that small ones are kept on average.
        release_gradients: Step each weight in the backward pass and let its gradient go, which
            takes the gradients' memory away; not with accumulation, clipping or several ranks.
    """

    MOMENTS: ClassVar[int]
    BLOCK = 256  # numbers that share a scale of 4 bytes

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        schedule: ScheduleName,
        warmup_steps: int,
        least_size: int,
        paged: bool,
        stochastic_rounding: bool,
        release_gradients: bool,
    ) -> None:
        super().__init__(lr, schedule, warmup_steps)
        check_moments(betas, weight_decay)
        check_number("least_size", least_size, 0)
        self.betas, self.weight_decay = betas, weight_decay
        self.least_size = least_size
        self.options = {"min_8bit_size": least_size, "is_paged": paged}
        self.supports_bf16_weights, self.releases = stochastic_rounding, release_gradients

    def state_bytes(self, parameter: nn.Parameter) -> int:
        """Return the bytes of its moments, with their scales where they have 8 bits."""
        size = parameter.numel()
        quantized = size + 4 * -(-size // self.BLOCK)
        return self.MOMENTS * (4 * size if size < self.least_size else quantized)

    def stepping(self, optimizer: Any) -> Optimizer:
        """Return an optimizer of bitsandbytes that rounds and releases as it was said."""
        if self.supports_bf16_weights:
            optimizer.update_step = StochasticRounding(optimizer)
        if self.releases:
            release_gradients(optimizer)
        return optimizer  # type: ignore[no-any-return]


class AdamW8bit(EightBit):
    """AdamW whose moments are kept in 8 bits, block by block (bitsandbytes, arXiv 2110.02861).

    A weight's two moments then take 2 bytes instead of 8. Small tensors, where there is nothing to
    save, keep theirs in float32: as a rule norms, biases and LoRAs.

    Args:
        lr: Learning rate after the warm-up.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
        least_size: Tensors with fewer elements keep their moments in float32.
        paged: Let a GPU that is full move moments to the host for the time being.
        stochastic_rounding: Learn weights of bfloat16, see `--backbone.policy_dtype`: each step is
            rounded at random, so that small ones are kept on average.
        release_gradients: Step each weight in the backward pass and let its gradient go, which
            takes the gradients' memory away; not with accumulation, clipping or several ranks.
    """

    MOMENTS = 2

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
        least_size: int = LEAST_SIZE,
        paged: bool = False,
        stochastic_rounding: bool = False,
        release_gradients: bool = False,
    ) -> None:
        super().__init__(
            lr,
            betas,
            weight_decay,
            schedule,
            warmup_steps,
            least_size,
            paged,
            stochastic_rounding,
            release_gradients,
        )
        check_number("eps", eps, 0)
        self.eps = eps

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return bitsandbytes' AdamW8bit."""
        adam = _bitsandbytes().AdamW8bit
        return self.stepping(
            adam(parameters, self.lr, self.betas, self.eps, self.weight_decay, **self.options)
        )


class Lion8bit(EightBit):
    """Lion (arXiv 2302.06675) whose one moment is kept in 8 bits, block by block (bitsandbytes).

    Its steps are signs: it wants a learning rate of a third to a tenth of AdamW's, and as much more
    weight decay.

    Args:
        lr: Learning rate after the warm-up.
        betas: Decay rates of the update and of the moment.
        weight_decay: Decoupled weight decay.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
        least_size: Tensors with fewer elements keep their moment in float32.
        paged: Let a GPU that is full move moments to the host for the time being.
        stochastic_rounding: Learn weights of bfloat16, see `--backbone.policy_dtype`: each step is
            rounded at random, so that small ones are kept on average.
        release_gradients: Step each weight in the backward pass and let its gradient go, which
            takes the gradients' memory away; not with accumulation, clipping or several ranks.
    """

    MOMENTS = 1

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
        least_size: int = LEAST_SIZE,
        paged: bool = False,
        stochastic_rounding: bool = False,
        release_gradients: bool = False,
    ) -> None:
        super().__init__(
            lr,
            betas,
            weight_decay,
            schedule,
            warmup_steps,
            least_size,
            paged,
            stochastic_rounding,
            release_gradients,
        )

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return bitsandbytes' Lion8bit."""
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
            "8-bit optimizers want bitsandbytes: `pip install lit-prefopt[bitsandbytes]`, or take "
            "AdamW or Adafactor."
        ) from error
