"""Stochastic rounding: weights of 16 bits that small steps still move, on average exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.utils.seeds import stable_seed

LOST_BITS = 16  # of a float32's 32, bfloat16 keeps the upper half


def stochastic_round(exact: Tensor, random: torch.Generator) -> Tensor:
    """Return bfloat16 numbers whose expectation is the exact one.

    Each is one of the two neighbours of its exact number, the nearer one more often (arXiv
    2010.06192). To the nearest, a step below half the distance of the two would always be lost.

    Args:
        exact: float32, of any shape.
        random: Of the same device.
    """
    noise = torch.randint(
        2**LOST_BITS, exact.shape, dtype=torch.int32, device=exact.device, generator=random
    )
    bits = (exact.view(torch.int32) + noise) & (-(2**LOST_BITS))
    upwards = bits.view(torch.float32)
    # what is infinite or no number stays it
    return torch.where(exact.isfinite(), upwards, exact).bfloat16()


class StochasticRounding:
    """Takes an optimizer's step of one weight in float32 and rounds the weight back at random.

    torchao's optimizers do the same in a kernel that is compiled for each shape; this needs no
    compiler, and its draws follow from weight and step, so that a resumed run repeats them.

    Args:
        optimizer: Of bitsandbytes; this takes the place of its `update_step`.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.step = optimizer, optimizer.update_step

    def __call__(
        self, group: dict[str, Any], weight: nn.Parameter, gindex: int, pindex: int
    ) -> None:
        """Update one weight."""
        if weight.dtype != torch.bfloat16:
            self.step(group, weight, gindex, pindex)
            return
        rounded, gradient = weight.data, weight.grad
        assert gradient is not None
        weight.data = rounded.float()  # one tensor at a time has both precisions
        weight.grad = gradient.float()
        self.step(group, weight, gindex, pindex)
        seed = stable_seed("rounding", gindex, pindex, self.optimizer.state[weight]["step"])
        random = torch.Generator(rounded.device).manual_seed(seed)
        rounded.copy_(stochastic_round(weight.data, random))
        weight.data = rounded
        weight.grad = gradient
