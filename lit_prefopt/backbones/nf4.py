"""4-bit quantization (NF4) of a frozen linear layer (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.errors import InputError


def nf4_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer quantized to 4 bits (NF4), frozen.

    Each block of 64 weights has a scale, which has 8 bits and shares a scale with 255 others; each
    weight is the number of a quantile of the normal distribution.

    Args:
        layer: The layer.
        dtype: Precision in which it computes with dequantized weights.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    library = _bitsandbytes()
    made = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
    )
    made.weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    # On some CPUs it would repack its weights in evaluation mode, and round differently.
    made.support_avx512bf16_for_cpu = False
    return made.to(layer.weight.device).requires_grad_(False)  # type: ignore[no-any-return]


def nf4_scales(weight: nn.Parameter) -> list[Tensor]:
    """Return the tensors that a weight in 4 bits has besides; none of any other weight.

    They are neither parameters nor buffers: the scales of its blocks in 8 bits, their own scales
    and mean, and the table of quantiles. A table of 1 kB that all layers share is left out.

    Args:
        weight: A parameter.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, state.state2.absmax, state.offset, state.code]


def _bitsandbytes() -> Any:
    """Return the layers of bitsandbytes, which is untyped."""
    try:
        return importlib.import_module("bitsandbytes.nn")
    except ImportError as error:
        raise InputError(
            "`--backbone.quantization nf4` needs bitsandbytes: `pip install "
            "lit-prefopt[bitsandbytes]`, or choose int8, which does not."
        ) from error
