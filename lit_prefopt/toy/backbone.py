"""The toy world's Stable Diffusion, shipped in the package, and its latent consistency model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_prefopt.backbones import LatentConsistency, StableDiffusion
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling

CHECKPOINT = Path(__file__).parent / "checkpoint"
FLOW_CHECKPOINT = Path(__file__).parent / "flow_checkpoint"
TOY_SAMPLING = Sampling(steps=20, guidance=2.0, eta=1.0, batch_size=64)
TOY_LCM_SAMPLING = Sampling(steps=4, guidance=2.0, batch_size=64)


class ToyDiffusion(StableDiffusion):
    """The shipped Stable Diffusion of the toy world: 32 x 32 pixels, a UNet of 4 M parameters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(str(CHECKPOINT), **kwargs)

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
        pretrained: Folder of the LCM's pipeline, as `make toy-lcm` writes it; the shipped Stable
            Diffusion, to distil it, if not given.
    """

    def __init__(self, pretrained: str | None = None, **kwargs: Any) -> None:
        if pretrained is not None and not Path(pretrained).is_dir():
            raise InputError(
                f"{pretrained} is not a folder: distil the toy world's LCM with `make toy-lcm`, or "
                "name its folder as `--backbone.pretrained`."
            )
        super().__init__(pretrained or str(CHECKPOINT), teacher=str(CHECKPOINT), **kwargs)

    @property
    def sampling(self) -> Sampling:
        """A fifth of the steps of its teacher, with the same guidance."""
        return TOY_LCM_SAMPLING
