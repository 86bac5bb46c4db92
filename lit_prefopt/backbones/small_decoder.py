"""A small, fast decoder for images that only a judge sees."""

from __future__ import annotations

from contextlib import suppress

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.errors import InputError
from lit_prefopt.weights.hub import check_reachable


class SmallDecoder(nn.Module):
    """Decoder of an AutoencoderTiny (TAESD): the VAE's images approximately, at a fraction of cost.

    Args:
        source: Hub name or folder of an AutoencoderTiny, or of a pipeline that has one as its VAE.
        dtype: Precision of its weights.
        channels: Channels of the latents.
        pixels: Downsampling factor of the VAE.

    Raises:
        InputError: It is no AutoencoderTiny, or one for other latents.
    """

    def __init__(self, source: str, dtype: torch.dtype, channels: int, pixels: int) -> None:
        super().__init__()
        check_reachable(source)
        if not _is_tiny(source):
            raise InputError(
                f"{source} has no AutoencoderTiny: name a folder or hub "
                "name of one, such as madebyollin/taesd or madebyollin/taesdxl, as "
                "`--backbone.decoder`."
            )
        self.tiny = load_component(AutoencoderTiny, source, "vae", dtype)
        config = self.tiny.config
        factor = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
        if (config.latent_channels, factor) != (channels, pixels):
            raise InputError(
                f"The decoder {source} makes {factor} pixels of each latent of "
                f"{config.latent_channels} channels where this backbone's VAE makes {pixels} of "
                f"{channels}: name the decoder of this family as `--backbone.decoder`."
            )

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents at the denoiser's scale to images (B, 3, H, W) in [-1, 1], float32."""
        scaled = (latents / self.tiny.config.scaling_factor).to(self.tiny.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self.tiny.decode(scaled).sample.float().clamp(-1, 1)


def _is_tiny(source: str) -> bool:
    """Whether a source is an AutoencoderTiny; diffusers loads any other VAE with random weights."""
    for folder in (None, "vae"):
        with suppress(OSError):
            config = AutoencoderTiny.load_config(source, subfolder=folder)
            if config.get("_class_name") == AutoencoderTiny.__name__:
                return True
    return False
