"""The toy world's Stable Diffusion: very small, real, and shipped in the package."""

from __future__ import annotations

from pathlib import Path

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.diffusion.settings import Sampling

CHECKPOINT = Path(__file__).parent / "checkpoint"
TOY_SAMPLING = Sampling(steps=20, guidance=2.0, eta=1.0, batch_size=64)


class ToyDiffusion(StableDiffusion):
    """The shipped Stable Diffusion of the toy world: 32 x 32 pixels, a UNet of 4 M parameters.

    Args:
        lora: Train an adapter of this form; all weights of the UNet where it is not given.
        reference: `initial` for the weights that training starts from (with LoRA the UNet without
            its adapter, else a frozen copy), `none`, or a folder with another UNet.
        denoiser: What training starts from: a folder with another UNet, or a .json configuration
            for one with fresh weights; the shipped UNet where it is not given.
        gradient_checkpointing: Compute activations twice instead of keeping them.
    """

    def __init__(
        self,
        lora: LoRA | None = None,
        reference: str = "initial",
        denoiser: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(str(CHECKPOINT), denoiser, lora, reference, gradient_checkpointing)

    @property
    def sampling(self) -> Sampling:
        """Few steps; eta 1 and a low guidance keep the samples of one prompt different."""
        return TOY_SAMPLING
