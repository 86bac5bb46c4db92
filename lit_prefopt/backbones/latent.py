"""Base class of latent diffusion families: a VAE that encodes and decodes images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.errors import InputError


class VAEBackbone(Backbone):
    """A denoiser over the latents of a VAE, of which only the configuration is always loaded."""

    vae: Any  # Any: diffusers is untyped; None if not loaded
    vae_config: Any
    small_decoder: Any  # None if the VAE decodes everything

    @property
    def has_encoders(self) -> bool:
        """Whether VAE and text encoders are loaded."""
        return self.vae is not None

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision of the VAE's latents."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to mean and deviation, in the VAE's precision and scale."""
        self.require_encoders("A run on images")
        height, width = images.shape[-2:]
        if height % self.pixels_per_latent or width % self.pixels_per_latent:
            raise InputError(
                f"The backbone's VAE cannot encode images of {width} x {height} pixels: set "
                f"`--data.resolution` to a multiple of {self.pixels_per_latent}."
            )
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def scaled(self, means: Tensor) -> Tensor:
        """Shift and scale means as the denoiser expects latents, float32."""
        shift = self.vae_config.shift_factor
        shifted = means.float() if shift is None else means.float() - shift
        return shifted * self.vae_config.scaling_factor

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations as those of the denoiser's latents, float32."""
        return deviations.float() * self.vae_config.scaling_factor

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to mean and deviation of the scaled latents, float32."""
        mean, deviation = self.posterior(images)
        return self.scaled(mean), self.scaled_deviation(deviation)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32."""
        self.require_encoders("Decoding latents")
        own, shift = latents / self.vae_config.scaling_factor, self.vae_config.shift_factor
        own = (own if shift is None else own + shift).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(own).sample.float().clamp(-1, 1)

    def preview(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32, with the small decoder if there is one."""
        return self.decode(latents) if self.small_decoder is None else self.small_decoder(latents)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the denoiser requires, by name."""
        return super().latent_settings() | {
            "scaling_factor": self.vae_config.scaling_factor,
            "shift_factor": self.vae_config.shift_factor,
        }

    @property
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, along each side."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)


def upcast_vae_if_needed(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the VAE in float32 if its configuration says that it overflows in float16."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    return vae.float() if overflows else vae


def full_config(config: dict[str, Any]) -> Any:
    """Return the configuration of a VAE with the defaults of its class, without weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(config).config
