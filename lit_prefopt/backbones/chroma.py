"""Chroma: T5, a transformer of double and single blocks without CLIP, and FLUX.1's VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance
from lit_prefopt.backbones.masked_checkpoint import mask_checkpointed_blocks
from lit_prefopt.backbones.packing import pack, unpack
from lit_prefopt.backbones.text_encoders import TextEncoder
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import check_number
from lit_prefopt.families.chroma import CHROMA
from lit_prefopt.processes.flow_shift import linear_shift
from lit_prefopt.processes.settings import Sampling

T5 = "text_encoder"


class MaskedT5Text(TextEncoder):
    """The encoder of a T5 whose tokens do not attend to padding."""

    MASKED = True


class Chroma(TransformerBackbone):
    """Chroma1-HD or -Base (lodestones/Chroma1-HD), from the hub, a folder or a single file.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        text_tokens: Number of T5's tokens to which a prompt is padded or cut.
    """

    FAMILY = CHROMA
    ENCODERS: ClassVar = {T5: MaskedT5Text}
    GUIDANCE = Guidance(batch="separate")
    MU = linear_shift
    LINEAR = True

    def __init__(self, pretrained: str, *, text_tokens: int = 512, **kwargs: Any) -> None:
        check_number("text_tokens", text_tokens, 1)
        self.text_tokens = text_tokens
        super().__init__(pretrained, **kwargs)
        if T5 in self.texts:
            self.texts[T5].length = text_tokens

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: T5's tokens, and which of them are the text and the first padding."""
        self.require_encoders("Embedding prompts")
        text = self.texts[T5]
        tokens = text.tokenize(texts)
        hidden = text.encode_tokens(tokens)[0]
        lengths = tokens.attention_mask.sum(1, keepdim=True)
        mask = torch.arange(self.text_tokens) <= lengths
        return Prompt({"hidden": hidden, "mask": mask.to(hidden.device)})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); the network's time is t in its precision.

        As the stock pipeline of diffusers 0.42, it passes a mask of 0 and 1 that attention adds to
        its scores: padding is attended to, with less weight.
        """
        (height, width), device = latents.shape[-2:], latents.device
        mask_checkpointed_blocks(self.policy.net)  # a run may switch it on and off
        tokens, hidden = pack(latents), prompt["hidden"].to(self.dtype)
        image = prompt["mask"].new_ones(tokens.shape[:2])
        sides = (torch.arange(n, device=device) for n in (1, height // 2, width // 2))
        predicted = self.policy.net(
            hidden_states=tokens,
            timestep=self.rounded_time(t),
            encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3, dtype=self.frozen_dtype),
            img_ids=torch.cartesian_prod(*sides).to(latents.dtype),  # 0, row, column of each token
            attention_mask=torch.cat([prompt["mask"], image], 1).to(self.dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width, tokens = self.policy.denoiser.config.joint_attention_dim, self.text_tokens
        text = {"hidden": width, "mask": tokens}
        return super().latent_settings() | {"text": text, "tokens": tokens}

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=35, guidance=5.0, batch_size=4)

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected = {"out_channels": net.config.in_channels} if net.config.out_channels else {}
        if encoders:
            expected["joint_attention_dim"] = encoders[T5].config.d_model
        check_transformer(net, expected, source, type(self).__name__)
