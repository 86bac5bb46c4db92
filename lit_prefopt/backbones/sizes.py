"""Which image sizes a VAE can use."""

from __future__ import annotations

from diffusers import AutoencoderKL
from torch import Tensor

from lit_prefopt.errors import InputError


def check_size(images: Tensor, vae: AutoencoderKL) -> None:
    """Refuse images whose sides the VAE cannot halve as often as it has to.

    Args:
        images: (B, 3, H, W).
        vae: The autoencoder that is to encode them.

    Raises:
        InputError: A side is no multiple of the VAE's factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise InputError(
            f"The backbone's VAE cannot encode images of {width} x {height} pixels: set "
            f"`--data.resolution` to a multiple of {factor}."
        )
