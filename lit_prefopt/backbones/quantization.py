"""Quantization of frozen weights below a LoRA: 4 bits (NF4, QLoRA) or 8 bits (int8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from lit_prefopt.backbones.int8 import Int8Linear
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.nf4 import nf4_linear
from lit_prefopt.backbones.repeated_blocks import repeated_blocks, require_blocks
from lit_prefopt.errors import InputError

Quantization = Literal["nf4", "int8"]

KINDS: dict[Quantization, str] = {"nf4": "4 bits (NF4)", "int8": "8 bits (int8)"}
"""Each quantization in words."""

NF4_BLOCK = 64
"""Weights that share a scale of 8 bits in NF4."""
NF4_SCALES = 256
"""Scales that share a float32 scale."""


def quantize(
    denoiser: nn.Module, kind: Quantization, dtype: torch.dtype, lora: LoRA | None
) -> None:
    """Quantize the linear layers of a denoiser's transformer blocks, one after another, in place.

    SDXL's UNet shrinks from 5.1 GB in 16 bits to 1.9 GB in NF4 and 3.0 in int8; that of SD 1.5,
    most of whose weights are convolutions, from 1.7 to 1.4 and 1.5 GB. Of a flow transformer's
    blocks the layers of the modulation are quantized too.

    Args:
        denoiser: The UNet or transformer, frozen.
        kind: `nf4` or `int8`.
        dtype: Precision in which layers in NF4 compute with dequantized weights.
        lora: The adapter that is trained, and added afterwards.

    Raises:
        InputError: There is no adapter, or there are no transformer blocks.
    """
    if lora is None:
        raise InputError(
            "Quantized weights cannot be trained: add an adapter, such as "
            "`--backbone.lora LoRA --backbone.lora.rank 16`, or leave `--backbone.quantization` "
            "null."
        )
    for block in require_blocks(denoiser, "--backbone.quantization"):
        for name, layer in [*block.named_modules()]:
            if type(layer) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                made = nf4_linear(layer, dtype) if kind == "nf4" else Int8Linear(layer)
                setattr(block.get_submodule(parent), leaf, made)


def saved_bytes(denoiser: nn.Module, kind: Quantization) -> int:
    """Compute the bytes that a quantization would save, from shapes.

    Args:
        denoiser: The UNet or transformer, not quantized, with or without an adapter.
        kind: `nf4` or `int8`.
    """
    return sum(
        layer.weight.numel() * layer.weight.element_size() - _quantized_bytes(layer, kind)
        for layer in _frozen_layers(denoiser)
    )


def largest_layer(denoiser: nn.Module) -> int:
    """Return the bytes of the largest layer that would be quantized: it is dequantized for its use.

    Args:
        denoiser: The UNet or transformer, not quantized, with or without an adapter.
    """
    sizes = (w.numel() * w.element_size() for w in (x.weight for x in _frozen_layers(denoiser)))
    return max(sizes, default=0)


def _quantized_bytes(layer: nn.Linear, kind: Quantization) -> int:
    """Return the bytes of a quantized layer's weights and scales."""
    count = layer.weight.numel()
    if kind == "int8":
        return count + 4 * layer.out_features
    scales = -(-count // NF4_BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // NF4_SCALES)


def _frozen_layers(denoiser: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers of the transformer blocks that quantization would change."""
    seen = set()
    for block in repeated_blocks(denoiser):
        for name, layer in block.named_modules():
            if type(layer) is nn.Linear and "lora_" not in name and id(layer) not in seen:
                seen.add(id(layer))
                yield layer
