"""FLUX.2 klein base: a Qwen3 text encoder, a transformer, a VAE with batch-norm statistics."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

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
from lit_prefopt.utils.fingerprint import fingerprint

STATES = (9, 18, 27)
"""Hidden states of the text encoder that are the embedded prompt, side by side."""


class Flux2Klein(TransformerBackbone):
    """FLUX.2 klein base 4B or 9B (model card black-forest-labs/FLUX.2-klein-base-4B).

    Prompts are padded to 512 tokens, and the padding is attended, as in the stock pipeline.
    """

    FAMILY = FLUX2
    ENCODERS: ClassVar = {"text_encoder": ChatText}
    GUIDANCE = Guidance("separate")
    PATCH = 1
    MU = staticmethod(flux2_shift)
    LINEAR = True

    latent_mean: Tensor
    latent_std: Tensor

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: three hidden states of all tokens side by side."""
        self.require_encoders("Embedding prompts")
        encoded = self.texts["text_encoder"].encode(
            texts,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # of a vocabulary of 150,000, and not used
        )
        return Prompt({"hidden": torch.cat([encoded.hidden_states[i] for i in STATES], dim=-1)})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); the network's time is t in its own precision."""
        hidden = prompt["hidden"].to(self.dtype)
        (count, tokens, _), (height, width) = hidden.shape, latents.shape[-2:]
        predicted: Tensor = self.policy.net(
            hidden_states=to_tokens(latents),
            timestep=self.rounded_time(t),
            guidance=None,
            encoder_hidden_states=hidden,
            txt_ids=_ids(1, 1, tokens, latents.device).expand(count, -1, -1),
            img_ids=_ids(height, width, 1, latents.device).expand(count, -1, -1),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        return from_tokens(predicted, height, width)

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mode = pixel_unshuffle(self.vae.encode(images).latent_dist.mode(), 2)
        return mode, torch.zeros_like(mode)

    def scaled(self, means: Tensor) -> Tensor:
        """Normalize means by the statistics of the VAE's batch norm, float32."""
        return (means.float() - self.latent_mean) / self.latent_std

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations as those of the denoiser's latents, float32."""
        return deviations.float() / self.latent_std

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents in the VAE's scale: the inverse of `scaled`."""
        return latents * self.latent_std + self.latent_mean

    def _images(self, latents: Tensor) -> Tensor:
        return super()._images(pixel_shuffle(latents, 2))

    def scale_settings(self) -> dict[str, Any]:
        """Return the fingerprint of the statistics by name, as caches state it."""
        return {"batch_norm": fingerprint({"mean": self.latent_mean, "std": self.latent_std})}

    def _keep_statistics(self, vae: Any, source: str) -> None:
        mean, variance = (
            x.float().view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var)
        )
        std = (variance + vae.config.batch_norm_eps).sqrt()
        if not (std > 0).all():
            raise InputError(
                f"The VAE of {source} has variances of its latents that are not above 0 "
                "(bn.running_var): copy its weights again, or name another as `--backbone.vae`."
            )
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width = self.policy.denoiser.config.joint_attention_dim
        text = {"text": {"hidden": width}, "tokens": ChatText.LENGTH}
        return super().latent_settings() | text

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the native size: squares of 2 x 2 of the VAE's."""
        return self.policy.denoiser.config.in_channels, *super().latent_shape[1:]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent, along each side: a square of 2 x 2 of the VAE's."""
        return 2 * super().pixels_per_latent

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=50, guidance=4.0, batch_size=4)

    def distilled(self, parts: Components) -> str | None:
        """Return why the checkpoint seems to be distilled to few steps, or None."""
        return (
            "its model_index.json has is_distilled" if parts.option("is_distilled", False) else None
        )

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        config = net.config
        expected = {"guidance_embeds": False, "patch_size": 1}
        expected["out_channels"] = None if config.out_channels is None else config.in_channels
        for encoder in encoders.values():
            expected["joint_attention_dim"] = len(STATES) * encoder.config.hidden_size
            layers = encoder.config.num_hidden_layers
            if layers < max(STATES):
                raise InputError(
                    f"The text encoder of {self.FAMILY.title} has {layers} layers, and the prompt "
                    f"is hidden state {max(STATES)}: name a pipeline with a whole Qwen3."
                )
        check_transformer(net, expected, source, type(self).__name__)


@lru_cache(maxsize=64)
def _ids(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """Return places of tokens, (1, rows * columns * tokens, 4) int64: time, row, column, place."""
    with torch.inference_mode(False):
        sides = (torch.arange(side, device=device) for side in (1, rows, columns, tokens))
        return torch.cartesian_prod(*sides)[None]
