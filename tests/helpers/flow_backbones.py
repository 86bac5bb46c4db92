"""What the tests of the flow families' backbones share: noised latents, changed configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from lit_prefopt.backbones import trained
from lit_prefopt.backbones.transformer import TransformerBackbone


def noised(rows: int = 2, shape: tuple[int, int, int] = (16, 8, 8)) -> tuple[Tensor, Tensor]:
    """Return latents and noise levels.

    Args:
        rows: Their number.
        shape: (C, H, W) of the latents.
    """
    generator = torch.Generator().manual_seed(3)
    levels = torch.linspace(0.2, 1.0, rows, dtype=torch.float64)
    return torch.randn(rows, *shape, generator=generator), levels


def changed(folder: str, to: Path, file: str = "model_index.json", **values: object) -> str:
    """Copy a pipeline, change one of its configurations, and return the copy.

    Args:
        folder: The pipeline.
        to: Where the copy is made.
        file: The configuration.
        **values: What is changed in it.
    """
    shutil.copytree(folder, to)
    config = json.loads((to / file).read_text("utf-8"))
    (to / file).write_text(json.dumps(config | values), "utf-8")
    return str(to)


def adapter_gradients(
    backbone: TransformerBackbone, texts: list[str], latents: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of a LoRA that is made other than the identity, those that it has.

    Args:
        backbone: A backbone with a LoRA.
        texts: B prompts.
        latents: Noised latents, (B, C, H, W).
        t: Their levels, (B,).
    """
    generator, parameters = torch.Generator().manual_seed(0), trained(backbone.policy.denoiser)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    backbone.train().predict(latents, t, backbone.embed(texts)).square().mean().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}
