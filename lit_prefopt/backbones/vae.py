"""A VAE that encodes images to latents and decodes latents to images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.backbones.component_checks import check_vae
from lit_prefopt.backbones.load_component import SINGLE_FILES, component_config, load_component
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.small_decoder import SmallDecoder
from lit_prefopt.backbones.without_weights import full_config
from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Family


class VAEBackbone(Backbone):
    """A denoiser over the latents of a VAE, of which only the configuration is always loaded."""

    FAMILY: ClassVar[Family]
    """Components of the family's pipelines, and their names in files."""

    vae: Any  # Any: diffusers is untyped; None if not loaded
    vae_config: Any
    small_decoder: Any  # None if the VAE decodes everything
    pretrained: str
    frozen_dtype: torch.dtype

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
        if not self.has_size(height, width):
            raise InputError(
                f"The backbone cannot encode images of {width} x {height} pixels: set "
                f"`--data.resolution` to {self.sizes}."
            )
        with torch.autocast(images.device.type, enabled=False):
            return self._posterior(images.to(self.vae.dtype))

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the VAE's mean and deviation of images in its precision, (B, C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def scaled(self, means: Tensor) -> Tensor:
        """Shift and scale means as the denoiser expects latents, float32."""
        shift = self.vae_config.shift_factor
        shifted = means.float() if shift is None else means.float() - shift
        return shifted * self.vae_config.scaling_factor

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations as those of the denoiser's latents, float32."""
        return deviations.float() * self.vae_config.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents in the VAE's scale: the inverse of `scaled`."""
        own, shift = latents / self.vae_config.scaling_factor, self.vae_config.shift_factor
        return own if shift is None else own + shift

    def scale_settings(self) -> dict[str, Any]:
        """Return the settings of `scaled` by name, as caches state them."""
        return {
            "scaling_factor": self.vae_config.scaling_factor,
            "shift_factor": self.vae_config.shift_factor,
        }

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to mean and deviation of the scaled latents, float32."""
        mean, deviation = self.posterior(images)
        return self.scaled(mean), self.scaled_deviation(deviation)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32."""
        self.require_encoders("Decoding latents")
        own = self.unscaled(latents).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self._images(own).float().clamp(-1, 1)

    def _images(self, latents: Tensor) -> Tensor:
        """Return the VAE's images of latents in its scale and precision, (B, 3, H, W)."""
        images: Tensor = self.vae.decode(latents).sample
        return images

    def preview(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32, with the small decoder if there is one."""
        return self.decode(latents) if self.small_decoder is None else self.small_decoder(latents)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the denoiser requires, by name."""
        return super().latent_settings() | self.scale_settings()

    @property
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, along each side."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    def _load_vae(
        self,
        parts: Components,
        source: str | None,
        decoder: str | None,
        *,
        load: bool,
        channels_last: bool,
    ) -> None:
        """Load the VAE or only its configuration, and the small decoder.

        Args:
            parts: The checkpoint's components.
            source: Hub name, folder or file of another VAE.
            decoder: Hub name or folder of a small decoder.
            load: Whether the weights are needed.
            channels_last: Whether a pixel's channels are stored contiguously.
        """
        kind = self.FAMILY.vae.kind
        self.vae = None
        own = None
        if load or self.FAMILY.scale == "batch-norm":
            own = (
                load_component(kind, source, "vae", self.frozen_dtype, config=parts.vae_config)
                if source
                else parts.vae(self.frozen_dtype)
            )
            self._keep_statistics(own, source or self.pretrained)
        if load:
            self.vae = freeze(upcast_vae_if_needed(own))
            self.vae_config = self.vae.config
            apply_memory_format_and_compile([self.vae], channels_last=channels_last, compiled=False)
        else:
            other = source if source and not source.endswith(SINGLE_FILES) else None
            found = component_config(kind, other, "vae") if other else parts.vae_config()
            self.vae_config = full_config(kind, found)
        channels = self.policy.denoiser.config.in_channels // self.FAMILY.packed
        check_vae(self.vae_config, source or self.pretrained, channels, self.FAMILY.scale)
        self.small_decoder = None
        if decoder is not None:
            channels, pixels = self.latent_shape[0], self.pixels_per_latent
            self.small_decoder = freeze(SmallDecoder(decoder, self.frozen_dtype, channels, pixels))

    def _keep_statistics(self, vae: Any, source: str) -> None:
        """Keep what `scaled` needs of a VAE's weights, which may be dropped afterwards.

        A family whose `scale` is `batch-norm` defines it: its statistics are among the weights, so
        that the VAE is read, from a file of a few hundred megabytes, even for cached latents.

        Args:
            vae: The VAE.
            source: Hub name, folder or file of it, for messages.
        """


def upcast_vae_if_needed(vae: Any) -> Any:
    """Return the VAE in float32 if its configuration says that it overflows in float16."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    return vae.float() if overflows else vae
