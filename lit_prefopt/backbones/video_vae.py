"""A video VAE for single images, with a mean and a deviation of each latent channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.backbones.vae import VAEBackbone
from lit_prefopt.utils.transfer import to_device


class VideoVAEBackbone(VAEBackbone):
    """A denoiser over the latents of a video VAE, of which an image is the only frame.

    Latents are normalized by the mean and the deviation of each channel in the VAE's configuration.
    """

    def scaled(self, means: Tensor) -> Tensor:
        """Subtract each channel's mean and divide by its deviation, float32."""
        return (means.float() - self._of_channels("mean", means)) / self._of_channels("std", means)

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Divide deviations by those of their channels, float32."""
        return deviations.float() / self._of_channels("std", deviations)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents in the VAE's scale: the inverse of `scaled`."""
        return latents * self._of_channels("std", latents) + self._of_channels("mean", latents)

    def scale_settings(self) -> dict[str, Any]:
        """Return the settings of `scaled` by name, as caches state them."""
        names = ("latents_mean", "latents_std")
        return {name: [*self.vae_config[name]] for name in names}

    @property
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, along each side."""
        return int(2 ** len(self.vae_config.temperal_downsample))

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the VAE's mean and deviation of images in its precision, (B, C, h, w)."""
        mean, deviation = super()._posterior(images.unsqueeze(2))
        return mean.squeeze(2), deviation.squeeze(2)

    def _images(self, latents: Tensor) -> Tensor:
        """Return the VAE's images of latents in its scale and precision, (B, 3, H, W)."""
        return super()._images(latents.unsqueeze(2)).squeeze(2)

    def _of_channels(self, name: str, latents: Tensor) -> Tensor:
        """Return a statistic of all channels, (C, 1, 1) float32 on the latents' device."""
        values = torch.tensor(self.vae_config[f"latents_{name}"], dtype=torch.float32)
        return to_device(values.view(-1, 1, 1), latents.device)
