"""How networks lie in memory, and which of their blocks are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin


def apply_memory_format_and_compile(
    networks: Sequence[ModelMixin], *, channels_last: bool, compiled: bool
) -> None:
    """Lay networks out for speed; their weights, and the names of these, stay what they are.

    Args:
        networks: All that must agree to the last bit, policy and reference, are treated alike.
        channels_last: Keep the channels of a pixel side by side, as GPUs' convolutions want them.
        compiled: Compile the blocks that a network repeats, once for each form of block (first
            use: a minute or two). An adapter may be turned on and off, and activations may be
            computed twice; policy and reference then agree up to rounding, since with and without
            gradients are different programs.
    """
    for network in networks:
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compiled:
            network.compile_repeated_blocks(fullgraph=True)
