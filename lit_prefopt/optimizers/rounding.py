"""Stochastic rounding of bfloat16 weights: small updates are exact on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.utils.seeds import stable_seed

LOST_BITS = 16  # bfloat16 keeps the upper 16 bits of float32


def stochastic_round(exact: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 numbers stochastically to bfloat16, so that the expectation is exact.

    Each becomes one of its two neighbours in bfloat16, the nearer one more often (arXiv
    2010.06192). Round-to-nearest loses every update below half the distance between the two.

    Args:
        exact: Numbers in float32, of any shape.
        random: Generator on the same device.
    """
    noise = torch.randint(
        2**LOST_BITS, exact.shape, dtype=torch.int32, device=exact.device, generator=random
    )
    bits = (exact.view(torch.int32) + noise) & (-(2**LOST_BITS))
    upwards = bits.view(torch.float32)
    # infinity and NaN are kept
    return torch.where(exact.isfinite(), upwards, exact).bfloat16()


class StochasticRounding:
    """Updates one weight in float32 and rounds it stochastically back to bfloat16.

    torchao's optimizers do the same in a kernel compiled for each shape; this needs no compiler,
    and its random numbers depend on weight and step, so that a resumed run repeats them.

    Args:
        optimizer: An optimizer of bitsandbytes, whose `update_step` this replaces.
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
        weight.data = rounded.float()  # only one tensor at a time is in both precisions
        weight.grad = gradient.float()
        self.step(group, weight, gindex, pindex)
        seed = stable_seed("rounding", gindex, pindex, self.optimizer.state[weight]["step"])
        random = torch.Generator(rounded.device).manual_seed(seed)
        rounded.copy_(stochastic_round(weight.data, random))
        weight.data = rounded
        weight.grad = gradient
