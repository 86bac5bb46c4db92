"""Train the toy world's VAE: 32×32 images to 8×8 latents of four channels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lit_prefopt.batches import ImagePairs
from lit_prefopt.effective_batch import scale_last_step
from lit_prefopt.toy.one_cycle import one_cycle


class ToyVAETraining(LightningModule):
    """Trains a small diffusers AutoencoderKL on toy images and saves it in diffusers' format.

    The scaling factor is set from the last latents, so that they have deviation 1.

    Args:
        output: Output folder of the trained VAE.
        lr: Peak of the one-cycle learning rate.
        kl_weight: Weight of the KL term (mean over latent elements), added to the mean absolute
            and the mean squared error.
        rim_weight: Additional weight of the error near the rims of objects, which distinguish a
            cross from a circle; most of an image is flat and quickly learned.
        channels: Width of each resolution, from 32×32 down; each one except the last halves the
            size.
    """

    latent_square: Tensor
    latent_mean: Tensor

    def __init__(
        self,
        output: str = "runs/toy/vae",
        lr: float = 2e-3,
        kl_weight: float = 1e-4,
        rim_weight: float = 8.0,
        channels: tuple[int, ...] = (32, 64, 64),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = Path(output)
        self.lr = lr
        self.kl_weight = kl_weight
        self.rim_weight = rim_weight
        self.vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
            sample_size=32,
            mid_block_add_attention=False,
        ).to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        # running moments of the latents, over about the last hundred batches
        self.register_buffer("latent_mean", torch.zeros(()))
        self.register_buffer("latent_square", torch.ones(()))

    def training_step(self, batch: ImagePairs) -> Tensor:
        """Return the reconstruction error plus the weighted KL term."""
        images = batch.images[:, 0]
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        self.latent_mean.lerp_(latents.detach().mean(), 0.02)
        self.latent_square.lerp_(latents.detach().square().mean(), 0.02)
        wrong = self.vae.decode(latents).sample - images
        kl = posterior.kl().mean() / latents[0].numel()
        self.log_dict({"train/error": wrong.abs().mean(), "train/kl": kl}, prog_bar=True)
        weight = 1 + self.rim_weight * rims(images)
        loss = (weight * (wrong.abs() + wrong.square())).mean() + self.kl_weight * kl
        return scale_last_step(loss, self._trainer)

    def validation_step(self, batch: ImagePairs) -> None:
        """Log the mean absolute error of the reconstruction, on images in [-1, 1]."""
        images = batch.images[:, 0]
        rebuilt = self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample
        error = (rebuilt - images).abs().mean()
        self.log("val/error", error, prog_bar=True, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW under a one-cycle schedule over the whole run."""
        steps = int(self.trainer.estimated_stepping_batches)
        return one_cycle(self.vae.parameters(), self.lr, 1e-4, steps)

    def on_fit_end(self) -> None:
        """Set the scaling factor and write the VAE."""
        deviation = (self.latent_square - self.latent_mean.square()).sqrt().item()
        self.vae.register_to_config(scaling_factor=round(1 / deviation, 5))
        if self.trainer.is_global_zero:
            self.vae.save_pretrained(self.output)


def rims(images: Tensor) -> Tensor:
    """Return 1 where an image differs from its 5×5 neighbourhood, else 0: (B, 1, H, W)."""
    around = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), "replicate"), 5, stride=1)
    return ((images - around).abs().amax(1, keepdim=True) > 0.05).float()
