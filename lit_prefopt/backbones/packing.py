"""Tokens of transformers: squares of 2 x 2 latents, and back."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def pack(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H/2 * W/2, 4 C), row by row.

    A token has channel c, row y and column x of its square at 4 c + 2 y + x.
    """
    return to_tokens(pixel_unshuffle(latents, 2))


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as latents (B, C, H, W): the inverse of `pack`.

    Args:
        tokens: (B, H/2 * W/2, 4 C).
        height: H.
        width: W.
    """
    return pixel_shuffle(from_tokens(tokens, height // 2, width // 2), 2)


def to_tokens(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H * W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, H * W, C) as latents (B, C, H, W).

    Args:
        tokens: The tokens, row by row.
        height: H.
        width: W.
    """
    return tokens.transpose(1, 2).unflatten(2, (height, width))
