"""Noise that stored samples were generated from, drawn again from their seeds."""

from __future__ import annotations

from torch import Tensor

from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError


def start_noise(pairs: Pairs) -> Tensor:
    """Return the noise that `sample` started from for each side, (B, K, C, H, W) float32.

    Args:
        pairs: B pairs of generated images, at the size at which they were sampled.

    Raises:
        InputError: The seeds of the samples are not known.
    """
    seeds = pairs.noise_seeds
    if seeds is None:
        raise InputError(
            "The noise that made both images is not known, since the pairs have no `seeds` in "
            "their .json: generate them with `lit-prefopt predict`, or take DiffusionDPO."
        )
    shape, device = pairs.latents.shape[2:], pairs.latents.device
    return draws.normal(seeds.flatten(), shape, "start", device).unflatten(0, seeds.shape)


def check_whole(frames: Tensor | None) -> None:
    """Check that images are stored at the size at which they are trained on.

    Args:
        frames: Size conditioning of B pairs, (B, K, 6): see `Prompt`.

    Raises:
        InputError: They were resized or cropped, so that their noise is that of other pixels.
    """
    if frames is None:
        return
    original, corner, crop = frames.cpu().split(2, -1)
    if original.equal(crop) and not corner.any():
        return
    height, width = original.flatten(0, 1)[0].tolist()
    raise InputError(
        f"A resized or cropped image does not belong to its noise, and some are stored with "
        f"{width} x {height} pixels: set `--data.resolution` to the size of all."
    )
