"""SDXL: two text encoders, pooled prompts, and size conditioning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.text_encoders import CLIPText
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.families.stable_diffusion_xl import SDXL
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.transfer import to_device


class StableDiffusionXL(UNetBackbone):
    """SDXL (arXiv 2307.01952), from the hub, a diffusers folder or a .safetensors file.

    The UNet is conditioned on each image's original size and crop. A dropped caption is embedded as
    the stock pipeline embeds a missing one: as zeros, unless the checkpoint's configuration
    disables it.
    """

    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any

    FAMILY = SDXL
    ENCODERS: ClassVar = {"text_encoder": CLIPText, "text_encoder_2": CLIPText}
    ADDITION = "text_time"
    EMPTY_IS_ZERO = True

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts.

        Token embeddings are the penultimate hidden states of both encoders, concatenated, before
        any final layer norm; the pooled prompt is the second encoder's projection.
        """
        self.require_encoders("Embedding prompts")
        first, _ = self.texts["text_encoder"].penultimate(texts)
        second, pooled = self.texts["text_encoder_2"].penultimate(texts)
        hidden = torch.cat([first, second], dim=-1)
        if self.empty_is_zero:
            empty = to_device(torch.tensor([text == "" for text in texts]), hidden.device)
            hidden = hidden.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return Prompt({"hidden": hidden, "pooled": pooled})

    def denoiser_kwargs(self, prompt: Prompt, latents: Tensor) -> dict[str, Any]:
        """Return the UNet's conditioning, with the pooled prompt and the size conditioning."""
        if "pooled" not in prompt:
            raise InputError(
                "SDXL needs pooled prompts and these have none: embed them with "
                "StableDiffusionXL, or cache the pairs again with it."
            )
        frames = prompt.frames
        if frames is None:
            height, width = (side * self.pixels_per_latent for side in latents.shape[-2:])
            frame = torch.tensor([height, width, 0, 0, height, width])
            frames = to_device(frame, latents.device).expand(len(latents), -1)
        added = {"text_embeds": prompt["pooled"].to(self.dtype), "time_ids": frames}
        return super().denoiser_kwargs(prompt, latents) | {"added_cond_kwargs": added}

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: the stock pipeline's guidance, in small batches."""
        return Sampling(guidance=5.0, batch_size=4)
