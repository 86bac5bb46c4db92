"""What the families of latent diffusion share: a VAE, and what is loaded of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.errors import InputError


class VAEBackbone(Backbone):
    """A denoiser over the latents of a VAE, which may be absent; its configuration is not."""

    vae: Any  # Any: diffusers is untyped; None where it is not loaded
    vae_config: Any
    small_decoder: Any  # None where the VAE decodes everything

    @property
    def has_encoders(self) -> bool:
        """Whether VAE and text encoders are loaded."""
        return self.vae is not None

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision of what the VAE returns."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation as the VAE computes them, in its precision and scale."""
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

    def scaled(self, latents: Tensor) -> Tensor:
        """Return means or deviations at the denoiser's scale, float32."""
        return latents.float() * self.vae_config.scaling_factor

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the scaled latents, float32."""
        mean, deviation = self.posterior(images)
        return self.scaled(mean), self.scaled(deviation)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1], float32."""
        self.require_encoders("What looks at images")
        scaled = (latents / self.vae_config.scaling_factor).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(scaled).sample.float().clamp(-1, 1)

    def preview(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1], float32, by the small decoder if there is one."""
        return self.decode(latents) if self.small_decoder is None else self.small_decoder(latents)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of an image one side of a latent stands for."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)


def upcast_vae_if_needed(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the VAE in float32 if it says that it overflows in float16."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    return vae.float() if overflows else vae


def full_config(config: dict[str, Any]) -> Any:
    """Return the configuration of a VAE with what it leaves to its class, without any weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(config).config
