"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, a VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.batches import Prompt
from lit_prefopt.families.stable_diffusion import SD1
from lit_prefopt.utils.transfer import to_device


class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x or 2.x, from the hub, a diffusers folder or a .safetensors file."""

    text_encoder: Any
    tokenizer: Any

    PIPELINE = StableDiffusionPipeline
    ENCODERS: ClassVar = {"text_encoder": CLIPTextModel}
    FAMILY = SD1  # and SD2, whose components have the same names

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the text encoder's last state after its final layer norm."""
        self.require_encoders("Embedding prompts")
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            return Prompt(self.text_encoder(to_device(tokens, device)).last_hidden_state)
