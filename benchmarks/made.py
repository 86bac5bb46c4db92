"""Backbones of full size whose weights are shapes alone, so that they take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig

from benchmarks.common import CLIP_G, CLIP_L, FULL_SIZE_VAE, SDXL_UNET, default_dtype
from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.backbones.loading import Components
from lit_prefopt.toy.assemble import SCHEDULER
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer, tiny_unet, tiny_vae, tiny_xl_unet

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FULL = {"CLIPTextModel": CLIP_L, "CLIPTextModelWithProjection": CLIP_G}
TINY = {"CLIPTextModel": {}, "CLIPTextModelWithProjection": {"hidden_size": 24}}
WIDE = {"projection_dim": 20, "hidden_act": "gelu"}


class MadeComponents(Components):
    """Parts on the meta device.

    Args:
        unet: Makes the UNet.
        full: Whether all else has full size.
        folder: Where tokenizers are written.
    """

    def __init__(self, unet: Any, full: bool, folder: Path) -> None:
        super().__init__(StableDiffusion.PIPELINE, "made")
        self.make, self.full, self.folder = unet, full, folder

    def scheduler(self) -> dict[str, Any]:
        """Return the usual schedule."""
        return {**SCHEDULER, "prediction_type": "epsilon"}

    def option(self, name: str, default: Any) -> Any:
        """Return what is usual."""
        return default

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet."""
        with torch.device("meta"), default_dtype(dtype):
            return self.make()

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the VAE."""
        with torch.device("meta"), default_dtype(dtype):
            return AutoencoderKL(**FULL_SIZE_VAE, sample_size=512) if self.full else tiny_vae()

    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's configuration."""
        return dict(self.vae(torch.float32).config)

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Return a text encoder."""
        changes = (FULL if self.full else TINY)[kind.__name__]
        if not self.full and kind.__name__ != "CLIPTextModel":
            changes = changes | WIDE
        config: CLIPTextConfig = tiny_text_config(self.tokenizer(name), **changes)
        with torch.device("meta"), default_dtype(dtype):
            return kind(config).eval()

    def tokenizer(self, name: str) -> Any:
        """Return a tokenizer."""
        return tiny_tokenizer(self.folder / name, length=77 if self.full else 16)


def without_numbers(network: nn.Module) -> nn.Module:
    """Return the network with weights of the same shapes that an active FakeTensorMode pretends."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


class MadeStableDiffusion(StableDiffusion):
    """Stable Diffusion 1.5, at full size or tiny."""

    full = True

    def _parts(self, pretrained: str, *_: Any) -> Components:
        make = (lambda: UNet2DConditionModel(**SD15_UNET)) if self.full else tiny_unet
        return MadeComponents(make, self.full, Path(pretrained))


class MadeStableDiffusionXL(StableDiffusionXL):
    """SDXL, at full size or tiny."""

    full = True

    def _parts(self, pretrained: str, *_: Any) -> Components:
        make = (lambda: UNet2DConditionModel(**SDXL_UNET)) if self.full else tiny_xl_unet
        return MadeComponents(make, self.full, Path(pretrained))


class TinyStableDiffusion(MadeStableDiffusion):
    """The same, tiny."""

    full = False


class TinyStableDiffusionXL(MadeStableDiffusionXL):
    """The same, tiny."""

    full = False


MADE = {
    "tiny": TinyStableDiffusion,
    "tiny-xl": TinyStableDiffusionXL,
    "sd15": MadeStableDiffusion,
    "sdxl": MadeStableDiffusionXL,
}
