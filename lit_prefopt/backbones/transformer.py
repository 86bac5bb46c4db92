"""Base class of families with a transformer and rectified flow over latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from lit_prefopt.backbones.build_process import build_flow
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.processes.flow_schedule import STEPS, Shift
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import LevelDraw


class TransformerBackbone(LatentBackbone):
    """A transformer with rectified flow over the latents of a VAE.

    A family adds how prompts are embedded (`embed`) and how its transformer is called (`velocity`).

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        levels: Distribution of the noise levels in training; the checkpoint's own shift of a
            logit-normal distribution if not given.
        without: Names of text encoders that are not loaded.
    """

    PATCH: ClassVar[int] = 2
    """Side of the square of latents that is one token of the transformer."""

    MU: ClassVar[Shift | None] = None
    """Function that returns the shift, if it depends on image tokens or sampling steps."""

    LINEAR: ClassVar[bool] = False
    """Whether the stock pipeline has levels of 1 to 1/n before the shift."""

    process: RectifiedFlow

    def __init__(
        self,
        pretrained: str,
        *,
        levels: LevelDraw | None = None,
        without: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        process = partial(
            build_flow, levels=levels, mu=type(self).MU, patch=self.PATCH, linear=self.LINEAR
        )
        super().__init__(pretrained, process=process, without=without, **kwargs)

    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity that the active network predicts, (B, C, H, W)."""
        if prompt.guidance is not None and not self.takes_guidance:
            raise InputError(
                f"The prompts have a guidance scale, which {type(self).__name__} is not "
                "conditioned on: leave it out; `sampling.guidance` is that of classifier-free "
                "guidance."
            )
        height, width = (side * self.pixels_per_latent for side in latents.shape[-2:])
        if not self.has_size(height, width):
            raise InputError(
                f"The transformer cannot denoise latents of {width} x {height} pixels: use images "
                f"whose sides are {self.sizes}."
            )
        return self.velocity(latents.to(self.dtype), t, prompt)

    @abstractmethod
    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the active network's prediction of noise - latents, (B, C, H, W).

        Args:
            latents: (B, C, H, W) in the network's precision.
            t: Noise levels, (B,) float64.
            prompt: B embedded prompts.
        """

    def rounded_time(self, t: Tensor) -> Tensor:
        """Return noise levels in the network's precision, as FLUX's pipelines round them, (B,).

        1000 t is rounded before the division: to multiples of 4 above 512 in bfloat16.
        """
        return (STEPS * t).float().to(self.dtype) / STEPS

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of images are multiples of: a token's side."""
        return self.pixels_per_latent * self.PATCH
