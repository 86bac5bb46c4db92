"""Gradient checkpointing of a transformer whose single blocks need the attention mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class MaskedCheckpoint:
    """Checkpoint a block, with the attention mask that diffusers 0.42 leaves out of single blocks.

    The mask is the last argument of the double blocks, which every forward begins with.

    Args:
        checkpoint: The checkpointing function of the network.
    """

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.mask: Tensor | None = None

    def __call__(self, block: Any, *arguments: Any) -> Any:
        """Return the block's outputs, which are computed again in the backward pass."""
        if len(arguments) == 3:  # hidden states, modulation, positions
            arguments = (*arguments, self.mask)
        self.mask = arguments[-1]
        return self.checkpoint(block, *arguments)


def mask_checkpointed_blocks(net: Any) -> None:
    """Pass the attention mask to the checkpointed single blocks of a transformer.

    Args:
        net: The transformer; nothing changes without gradient checkpointing.
    """
    own = net._gradient_checkpointing_func
    if net.gradient_checkpointing and not isinstance(own, MaskedCheckpoint):
        net._gradient_checkpointing_func = MaskedCheckpoint(own)
