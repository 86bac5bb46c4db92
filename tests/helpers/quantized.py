"""Backbones with quantized weights and in bfloat16."""

from __future__ import annotations

import torch

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.backbones.quantization import Quantization


def arguments(kind: Quantization) -> list[str]:
    """Return the options of a LoRA over quantized weights."""
    return ["--backbone.lora.rank", "4", "--backbone.quantization", kind]


def predicted(backbone: StableDiffusion) -> torch.Tensor:
    random, device = torch.Generator().manual_seed(0), next(backbone.parameters()).device
    latents = torch.randn(2, *backbone.latent_shape, generator=random).to(device)
    t = torch.tensor([10, 900], device=device)
    with torch.no_grad():
        return backbone.predict(latents, t, backbone.embed(["a", "b"]))


COARSE = [
    *("--backbone.policy_dtype", "bfloat16", "--model.optimizer", "AdamW8bit"),
    *("--model.optimizer.least_size", "0", "--model.optimizer.stochastic_rounding", "true"),
]
