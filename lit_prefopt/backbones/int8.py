"""8-bit quantization (int8) of a frozen linear layer, with one scale for each output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.utils.device import autocast_dtype

LARGEST = 127
"""Largest 8-bit weight; -128 is not used, so that positive and negative weights round alike."""


class Int8Linear(nn.Linear):
    """Linear layer whose frozen weights are 8-bit integers times a float32 scale for each output.

    The weights are dequantized in each forward and again in the backward, so that neither they nor
    the layer's inputs are kept for it. Only the weights are rounded: inputs and outputs have the
    precision of the layer's input or, under autocast, that of autocast, in training and evaluation
    alike.

    bitsandbytes' Linear8bitLt has the same weights. It is not used since it keeps the input of each
    layer despite gradient checkpointing, and in evaluation mode rounds the inputs as well, through
    float16, which makes NaN of those beyond 65504.

    Args:
        layer: The layer to quantize; its bias is shared, and its weights are not changed.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        # on the meta device, where neither memory nor random numbers are used
        has_bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, has_bias, device="meta")
        values, scale = quantize_rows(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the input and the dequantized weights, plus the bias."""
        if (dtype := autocast_dtype(input.device)) is not None:
            input = input.to(dtype)
        out: Tensor = _FrozenProduct.apply(input, self.weight, self.scale, self.bias)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move or convert the layer, except the scales' precision, which stays float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to 8 bits; return the integers and the float32 scale of each row.

    Args:
        weight: The matrix.
    """
    exact = weight.float()
    scale = exact.abs().amax(1) / LARGEST
    divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (exact / divisor.unsqueeze(1)).round().to(torch.int8), scale


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix in a given precision.

    Args:
        values: The 8-bit integers.
        scale: The scale of each row.
        dtype: The precision; each weight is rounded once.
    """
    return values.to(dtype).mul_(scale.unsqueeze(1))


class _FrozenProduct(torch.autograd.Function):
    """Linear layer with frozen quantized weights, which keeps only these for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, scale)
        weight = dequantize_rows(values, scale, x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        values, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return gradient @ dequantize_rows(values, scale, gradient.dtype), None, None, None
