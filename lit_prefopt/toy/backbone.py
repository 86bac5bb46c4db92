"""The toy world's Stable Diffusion, shipped in the package, and its latent consistency model."""

from __future__ import annotations

from pathlib import Path

from lit_prefopt.backbones import LatentConsistency, LoRA, StableDiffusion
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling

CHECKPOINT = Path(__file__).parent / "checkpoint"
TOY_SAMPLING = Sampling(steps=20, guidance=2.0, eta=1.0, batch_size=64)
TOY_LCM_SAMPLING = Sampling(steps=4, guidance=2.0, batch_size=64)


class ToyDiffusion(StableDiffusion):
    """The shipped Stable Diffusion of the toy world: 32 x 32 pixels, a UNet of 4 M parameters.

    Args:
        lora: Train an adapter of this form; by default all weights of the UNet.
        reference: `initial` for the weights that training starts from (with LoRA the UNet without
            its adapter, else a frozen copy), `none`, or a folder with another UNet.
        denoiser: The initial UNet: a folder with another UNet, or a .json configuration for one
            with new weights; by default the shipped UNet.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        encoders: Load VAE and text encoder; trainings on `CachedPairs` need neither.
    """

    def __init__(
        self,
        lora: LoRA | None = None,
        reference: str = "initial",
        denoiser: str | None = None,
        gradient_checkpointing: bool = False,
        encoders: bool = True,
    ) -> None:
        super().__init__(
            str(CHECKPOINT), denoiser, lora, reference, gradient_checkpointing, encoders=encoders
        )

    @property
    def checkpoint(self) -> str:
        """Name of the weights, independent of the package's path."""
        return "the toy world"

    @property
    def sampling(self) -> Sampling:
        """Few steps; eta 1 and low guidance keep the samples of a prompt diverse."""
        return TOY_SAMPLING


class ToyConsistency(LatentConsistency):
    """The toy world's latent consistency model, whose teacher is the shipped Stable Diffusion.

    Args:
        pretrained: Folder of the LCM's pipeline, from `make toy-lcm`; by default the shipped
            Stable Diffusion, to distil it.
        guidance_width: Width of the guidance embedding that is added to a UNet without one.
        lora: Train an adapter of this form; by default all weights of the UNet.
        reference: `initial` for the weights that training starts from (with LoRA the UNet without
            its adapter, else a frozen copy), `none`, or a folder with another UNet.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        encoders: Load VAE and text encoder; trainings on `CachedPairs` need neither.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        guidance_width: int | None = None,
        lora: LoRA | None = None,
        reference: str = "initial",
        gradient_checkpointing: bool = False,
        encoders: bool = True,
    ) -> None:
        if pretrained is not None and not Path(pretrained).is_dir():
            raise InputError(
                f"{pretrained} is not a folder: distil the toy world's LCM with `make toy-lcm`, or "
                "name its folder as `--backbone.pretrained`."
            )
        super().__init__(
            pretrained or str(CHECKPOINT),
            teacher=str(CHECKPOINT),
            guidance_width=guidance_width,
            lora=lora,
            reference=reference,
            gradient_checkpointing=gradient_checkpointing,
            encoders=encoders,
        )

    @property
    def sampling(self) -> Sampling:
        """A fifth of the steps of its teacher, with the same guidance."""
        return TOY_LCM_SAMPLING
