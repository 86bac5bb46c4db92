"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, a VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lit_prefopt.backbones.text_encoders import CLIPText
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.families.stable_diffusion import SD1


class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x or 2.x, from the hub, a diffusers folder or a .safetensors file."""

    text_encoder: Any
    tokenizer: Any

    FAMILY = SD1  # and SD2, whose components have the same names
    ENCODERS: ClassVar = {"text_encoder": CLIPText}

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the text encoder's last state after its final layer norm."""
        self.require_encoders("Embedding prompts")
        return Prompt({"hidden": self.texts["text_encoder"].encode(texts).last_hidden_state})
