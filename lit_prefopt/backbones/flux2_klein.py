"""FLUX.2 klein base: a Qwen3 text encoder, a transformer, a VAE with batch-norm statistics."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.batch_norm_vae import BatchNormVAEBackbone
from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.packing import from_tokens, to_tokens
from lit_prefopt.backbones.text_encoders import ChatText
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.processes.flow_shift import flux2_shift
from lit_prefopt.processes.settings import Sampling

STATES = (9, 18, 27)
"""Hidden states of the text encoder that are the embedded prompt, side by side."""


class Flux2Klein(BatchNormVAEBackbone, TransformerBackbone):
    """FLUX.2 klein base 4B or 9B (model card of black-forest-labs/FLUX.2-klein-base-4B).

    Prompts are padded to 512 tokens, and the padding is attended, as in the stock pipeline.
    """

    FAMILY = FLUX2
    ENCODERS: ClassVar = {"text_encoder": ChatText}
    GUIDANCE = Guidance("separate")
    PATCH = 1
    MU = flux2_shift
    LINEAR = True

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: three hidden states of all tokens side by side."""
        self.require_encoders("Embedding prompts")
        encoded = self.texts["text_encoder"].encode(
            texts,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # logits are not used, and have 150,000 numbers for each token
        )
        return Prompt({"hidden": torch.cat([encoded.hidden_states[i] for i in STATES], dim=-1)})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); the network's time is t in its own precision."""
        hidden = prompt["hidden"].to(self.dtype)
        (count, length, _), (height, width) = hidden.shape, latents.shape[-2:]
        predicted: Tensor = self.policy.net(
            hidden_states=to_tokens(latents),
            timestep=self.rounded_time(t),
            guidance=None,
            encoder_hidden_states=hidden,
            txt_ids=token_ids(1, 1, length, latents.device).expand(count, -1, -1),
            img_ids=token_ids(height, width, 1, latents.device).expand(count, -1, -1),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        return from_tokens(predicted, height, width)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width = self.policy.denoiser.config.joint_attention_dim
        text = {"text": {"hidden": width}, "tokens": ChatText.LENGTH}
        return super().latent_settings() | text

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=50, guidance=4.0, batch_size=4)

    def distilled(self, parts: Components) -> str | None:
        """Return why the checkpoint seems to be distilled to few steps, or None.

        Args:
            parts: The checkpoint's components.
        """
        marked = parts.option("is_distilled", False)
        return "its model_index.json has is_distilled" if marked else None

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected: dict[str, Any] = {"guidance_embeds": False, "patch_size": self.PATCH}
        if net.config.out_channels is not None:
            expected["out_channels"] = net.config.in_channels
        for encoder in encoders.values():
            layers = encoder.config.num_hidden_layers
            if layers < max(STATES):
                raise InputError(
                    f"The text encoder has {layers} layers and {type(self).__name__} needs "
                    f"hidden state {max(STATES)} of it: name a pipeline with its own Qwen3."
                )
            expected["joint_attention_dim"] = len(STATES) * encoder.config.hidden_size
        check_transformer(net, expected, source, type(self).__name__)


def token_ids(rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Return places of tokens, (1, rows * columns * length, 4) int64.

    Args:
        rows: Rows of tokens of an image, or 1.
        columns: Columns, or 1.
        length: Tokens of a text, or 1.
        device: Where they lie.
    """
    sides = (torch.arange(side, device=device) for side in (1, rows, columns, length))
    return torch.cartesian_prod(*sides)[None]
