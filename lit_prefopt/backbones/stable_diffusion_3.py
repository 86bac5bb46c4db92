"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer, a VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.text_encoders import CLIPText, T5Text
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.processes.settings import Sampling

T5 = "text_encoder_3"
CLIP_TOKENS = 77
MOST_TOKENS = 512
"""Largest number of T5's tokens that the stock pipeline takes."""


class StableDiffusion3(TransformerBackbone):
    """Stable Diffusion 3 or 3.5 (arXiv 2403.03206), from the hub, a folder or a .safetensors file.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        t5: Load the T5 text encoder, the largest part of the model. Without it, zeros take the
            place of its tokens, as in the stock pipeline.
        text_tokens: Number of T5's tokens to which a prompt is padded or cut; without T5, the
            number of zeros in their place, which may be 0.
    """

    FAMILY = SD3
    ENCODERS: ClassVar = {"text_encoder": CLIPText, "text_encoder_2": CLIPText, T5: T5Text}
    LEFT_OUT_BY: ClassVar = {T5: "--backbone.t5 false"}

    def __init__(
        self, pretrained: str, *, t5: bool = True, text_tokens: int = 256, **kwargs: Any
    ) -> None:
        check_number("text_tokens", text_tokens, 1 if t5 else 0, MOST_TOKENS)
        super().__init__(pretrained, without=() if t5 else (T5,), **kwargs)
        self.text_tokens = text_tokens
        if T5 in self.texts:
            self.texts[T5].length = text_tokens

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the tokens of both CLIPs side by side, then those of T5.

        The pooled prompt is that of both CLIPs.
        """
        self.require_encoders("Embedding prompts")
        clips = [self.texts[name].penultimate(texts) for name in ("text_encoder", "text_encoder_2")]
        clip = torch.cat([states for states, _ in clips], dim=-1)
        width = self.policy.denoiser.config.joint_attention_dim
        t5 = (
            self.texts[T5].encode(texts)[0]
            if T5 in self.texts
            else clip.new_zeros(len(texts), self.text_tokens, width)
        )
        hidden = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=-2)
        pooled = torch.cat([pooled for _, pooled in clips], dim=-1)
        return Prompt({"hidden": hidden, "pooled": pooled})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); the network's time is 1000 t in float32."""
        predicted: Tensor = self.policy.net(
            hidden_states=latents,
            timestep=(1000 * t).float(),
            encoder_hidden_states=prompt["hidden"].to(self.dtype),
            pooled_projections=prompt["pooled"].to(self.dtype),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        return predicted

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        config = self.policy.denoiser.config
        return super().latent_settings() | {
            "text": {
                "hidden": config.joint_attention_dim,
                "pooled": config.pooled_projection_dim,
            },
            "tokens": CLIP_TOKENS + self.text_tokens,
            "t5": T5 not in self.left_out,
        }

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=28, guidance=7.0, batch_size=4)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of images are multiples of: a token's side."""
        return self.pixels_per_latent * int(self.policy.denoiser.config.patch_size)

    @property
    def largest_side(self) -> int | None:
        """Largest side of images in pixels: the transformer's table of positions."""
        return int(self.policy.denoiser.config.pos_embed_max_size) * self.size_multiple

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected = {"out_channels": net.config.in_channels}
        clips = [encoder.config for name, encoder in encoders.items() if name != T5]
        if clips:
            expected["pooled_projection_dim"] = sum(clip.projection_dim for clip in clips)
        if T5 in encoders:
            expected["joint_attention_dim"] = encoders[T5].config.d_model
        check_transformer(net, expected, source, type(self).__name__)
        width, joint = sum(clip.hidden_size for clip in clips), net.config.joint_attention_dim
        if width > joint:
            raise InputError(
                f"The transformer of {source} takes tokens of width {joint} and its two CLIPs "
                f"have {width}: it belongs to another family; name one of Stable Diffusion 3."
            )
