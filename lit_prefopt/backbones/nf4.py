"""Frozen weights in four bits, below an adapter (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.errors import InputError


def quantize_nf4(unet: nn.Module, dtype: torch.dtype, lora: LoRA | None) -> None:
    """Turn the linear layers of a UNet's transformer blocks into 4-bit ones (NF4), in place.

    Of SDXL's 5.1 GB in 16 bits this leaves 1.9 GB; of the 1.7 GB of SD 1.5, most of whose weights
    are convolutions, 1.4 GB. Of each 64 weights a scale is kept, and for each one the number of a
    quantile of the normal distribution.

    Args:
        unet: Never to be trained itself.
        dtype: In which the layers calculate, once their weights are unfolded.
        lora: What is trained above it, and added afterwards.

    Raises:
        InputError: Nothing is.
    """
    if lora is None:
        raise InputError(
            "Weights of four bits cannot be trained: add an adapter to them, such as "
            "`--backbone.lora LoRA --backbone.lora.rank 16`, or leave `--backbone.nf4` false."
        )
    library = _bitsandbytes()
    for block in [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]:
        for name, layer in [*block.named_modules()]:
            if type(layer) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, _quantized(library, layer, dtype))


def _quantized(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return the layer with its weights in four bits."""
    made = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
    )
    made.weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    # On some CPUs it would repack its weights in evaluation, and calculate otherwise than before.
    made.support_avx512bf16_for_cpu = False
    return made.to(layer.weight.device).requires_grad_(False)  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    """Return the layers of bitsandbytes, which is untyped."""
    try:
        return importlib.import_module("bitsandbytes.nn")
    except ImportError as error:
        raise InputError(
            "`--backbone.nf4` wants bitsandbytes: `pip install lit-prefopt[bitsandbytes]`, or "
            "leave it false."
        ) from error
