"""The toy world's Stable Diffusion, its latent consistency model and its flow twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_prefopt.backbones import LatentConsistency, StableDiffusion, StableDiffusion3
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling

CHECKPOINT = Path(__file__).parent / "checkpoint"
FLOW_CHECKPOINT = Path(__file__).parent / "flow_checkpoint"
TOY_SAMPLING = Sampling(steps=20, guidance=2.0, eta=1.0, batch_size=64)
TOY_FLOW_SAMPLING = Sampling(steps=20, guidance=2.0, batch_size=64)
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


class ToyFlow(StableDiffusion3):
    """The toy world's flow twin: a Stable Diffusion 3 of 5.4 M parameters, 32 x 32 pixels.

    It has no T5, and none of the zeros that the stock pipeline puts in T5's place: these would be
    256 tokens beside 16 of the image and 16 of the text. The stock pipeline leaves them out, too,
    when it is called with `max_sequence_length=0`.

    Args:
        pretrained: Folder of another pipeline of this architecture, such as the start of its
            training; the shipped one if not given.
    """

    def __init__(self, pretrained: str | None = None, **kwargs: Any) -> None:
        folder = Path(pretrained or FLOW_CHECKPOINT)
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a folder: train the toy world's flow model with `make toy-flow`, "
                "and name its folder as `--backbone.pretrained`."
            )
        self.shipped = pretrained is None
        super().__init__(str(folder), t5=False, text_tokens=0, **kwargs)

    @property
    def checkpoint(self) -> str:
        """Name of the weights, independent of the package's path if they are the shipped ones."""
        return "the toy world's flow model" if self.shipped else super().checkpoint

    @property
    def sampling(self) -> Sampling:
        """Few steps and low guidance; the samples of a prompt differ by their first noise."""
        return TOY_FLOW_SAMPLING
