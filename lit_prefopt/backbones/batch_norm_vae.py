"""A VAE whose latents are taken in squares and normalised by a batch norm's statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lit_prefopt.backbones.vae import VAEBackbone
from lit_prefopt.errors import InputError
from lit_prefopt.utils.fingerprint import fingerprint


class BatchNormVAEBackbone(VAEBackbone):
    """A denoiser over squares of 2 x 2 latents of a VAE with batch-norm statistics, FLUX.2's.

    Latents are (B, 4 C, H / 2, W / 2) of the VAE's (B, C, H, W): the mode of its distribution, so
    that their deviation is 0, with the square's row y and column x at channel 4 c + 2 y + x. The
    statistics have the precision of the VAE, as in the stock pipeline.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def scaled(self, means: Tensor) -> Tensor:
        """Normalise means by the statistics of the VAE's batch norm, float32."""
        return (means.float() - self.latent_mean) / self.latent_std

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations as those of the denoiser's latents, float32."""
        return deviations.float() / self.latent_std

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents in the VAE's scale: the inverse of `scaled`."""
        return latents * self.latent_std + self.latent_mean

    def scale_settings(self) -> dict[str, Any]:
        """Return the fingerprint of the statistics by name, as caches state it."""
        return {"batch_norm": fingerprint({"mean": self.latent_mean, "std": self.latent_std})}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the family's native size."""
        side = self.FAMILY.native // self.pixels_per_latent
        return self.policy.denoiser.config.in_channels, side, side

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent, along each side: those of two latents of the VAE."""
        return 2 * super().pixels_per_latent

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mode = pixel_unshuffle(self.vae.encode(images).latent_dist.mode(), 2)
        return mode, torch.zeros_like(mode)

    def _images(self, latents: Tensor) -> Tensor:
        return super()._images(pixel_shuffle(latents, 2))

    def _keep_statistics(self, vae: Any, source: str) -> None:
        mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
        if not (variance.is_meta or (variance > 0).all()):
            raise InputError(
                f"The VAE of {source} has variances of its latents that are not above 0 "
                "(bn.running_var): copy its weights again, or name another as `--backbone.vae`."
            )
        std = (variance + vae.config.batch_norm_eps).sqrt()
        self.register_buffer("latent_mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("latent_std", std.view(1, -1, 1, 1), persistent=False)
