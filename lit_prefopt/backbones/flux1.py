"""FLUX.1: CLIP and T5, a transformer of double and single blocks, a VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.packing import pack, unpack
from lit_prefopt.backbones.text_encoders import CLIPText, T5Text
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.processes.flow_shift import linear_shift
from lit_prefopt.processes.settings import Sampling

CLIP, T5 = "text_encoder", "text_encoder_2"
NO_GUIDANCE = "its transformer has no guidance embedding, as that of FLUX.1 schnell"


class Flux1(TransformerBackbone):
    """FLUX.1 dev or Krea (black-forest-labs/FLUX.1-dev), from the hub, a folder or a single file.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        guidance: Guidance scale that conditions the transformer in training; 1, without, is that of
            kohya's guide, and 3.5, as in sampling, that of diffusers' train_dreambooth_flux.py.
        text_tokens: Number of T5's tokens to which a prompt is padded or cut.
    """

    FAMILY = FLUX1
    ENCODERS: ClassVar = {CLIP: CLIPText, T5: T5Text}
    GUIDANCE = Guidance(batch="separate")
    MU = linear_shift
    LINEAR = True

    def __init__(
        self, pretrained: str, *, guidance: float = 1.0, text_tokens: int = 512, **kwargs: Any
    ) -> None:
        check_number("guidance", guidance)
        check_number("text_tokens", text_tokens, 1)
        self.guidance, self.text_tokens = guidance, text_tokens
        super().__init__(pretrained, **kwargs)
        if T5 in self.texts:
            self.texts[T5].length = text_tokens

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: T5's tokens with their padding, and CLIP's pooled prompt."""
        self.require_encoders("Embedding prompts")
        pooled = self.texts[CLIP].encode(texts).pooler_output
        return Prompt({"hidden": self.texts[T5].encode(texts)[0], "pooled": pooled})

    def fits_context(self, text: str) -> bool:
        """Whether a prompt fits the context of T5; CLIP only adds the pooled prompt to it."""
        return T5 not in self.texts or self.texts[T5].fits_context(text)

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); the network's time is t in its precision."""
        (height, width), device = latents.shape[-2:], latents.device
        hidden, scale = prompt["hidden"].to(self.dtype), prompt.guidance
        if scale is None:
            scale = torch.full((len(latents),), self.guidance, device=device)
        sides = (torch.arange(n, device=device) for n in (1, height // 2, width // 2))
        predicted = self.policy.net(
            hidden_states=pack(latents),
            timestep=self.rounded_time(t),
            guidance=scale if self.policy.net.config.guidance_embeds else None,
            pooled_projections=prompt["pooled"].to(self.dtype),
            encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3, dtype=self.frozen_dtype),
            img_ids=torch.cartesian_prod(*sides).to(latents.dtype),  # 0, row, column of each token
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        config = self.policy.denoiser.config
        widths = {"hidden": config.joint_attention_dim, "pooled": config.pooled_projection_dim}
        return super().latent_settings() | {"text": widths, "tokens": self.text_tokens}

    def reference_settings(self) -> dict[str, Any]:
        """Return the settings that determine the reference's errors, by name."""
        return super().reference_settings() | {"guidance": self.guidance}

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: those of the stock pipeline, or schnell's."""
        steps, guidance = (28, 3.5) if self.takes_guidance else (4, 1.0)
        return Sampling(steps, guidance, batch_size=4)

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale conditions the transformer, so that one forward is enough."""
        return bool(self.policy.denoiser.config.guidance_embeds)

    def distilled(self, parts: Components) -> str | None:
        """Return why the checkpoint seems to be distilled to few steps, or None."""
        return None if parts.denoiser_config().get("guidance_embeds") else NO_GUIDANCE

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected = {"out_channels": net.config.in_channels} if net.config.out_channels else {}
        if encoders:
            expected["pooled_projection_dim"] = encoders[CLIP].config.hidden_size
            expected["joint_attention_dim"] = encoders[T5].config.d_model
        check_transformer(net, expected, source, type(self).__name__)
        if not (net.config.guidance_embeds or self.trains_distilled):
            self.refuse_distilled(source, NO_GUIDANCE)
        if not net.config.guidance_embeds and self.guidance != 1:
            raise InputError(
                f"{source} has no guidance embedding: leave out `--backbone.guidance`."
            )
