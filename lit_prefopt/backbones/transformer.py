"""Base class of families with a transformer and rectified flow over latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from lit_prefopt.backbones.build_process import build_flow
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.backbones.loading import Components
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.processes.flow_schedule import STEPS, Linear, Shift
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
        distilled: Train a model that was distilled to few steps, although training at all noise
            levels undoes the distillation.
    """

    PATCH: ClassVar[int] = 2
    """Side of the square of latents that is one token of the transformer."""

    MU: ClassVar[Shift | None] = None
    """Function that returns the shift, if it depends on image tokens or sampling steps."""

    LINEAR: ClassVar[Linear] = False
    """Whether the stock pipeline has levels of 1 to 1/n before the shift, and their precision."""

    process: RectifiedFlow

    def __init__(
        self,
        pretrained: str,
        *,
        levels: LevelDraw | None = None,
        without: Collection[str] = (),
        distilled: bool = False,
        **kwargs: Any,
    ) -> None:
        self.trains_distilled = distilled
        process = partial(
            build_flow, levels=levels, mu=type(self).MU, patch=self.PATCH, linear=self.LINEAR
        )
        super().__init__(pretrained, process=process, without=without, **kwargs)

    def distilled(self, parts: Components) -> str | None:
        """Return why the checkpoint seems to be distilled to few steps, or None if it does not.

        Args:
            parts: The checkpoint's components, of which configurations are loaded.
        """
        return None

    def _check_checkpoint(self, parts: Components) -> None:
        reason = None if self.trains_distilled else self.distilled(parts)
        if reason is not None:
            self.refuse_distilled(parts.pretrained, reason)

    def refuse_distilled(self, source: str, reason: str) -> NoReturn:
        """Refuse to train a distilled model.

        Args:
            source: Hub name, folder or file of the model.
            reason: Why it seems to be distilled, such as "its model_index.json has is_distilled".

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{source} is distilled to sample in few steps ({reason}), and training at all noise "
            "levels undoes the distillation, so that its images in few steps get worse: name the "
            "model that it was distilled from, or set `--backbone.distilled true` to train it all "
            "the same."
        )

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

    def _marks(self) -> dict[str, str]:
        name = self.FAMILY.architecture(self.policy.denoiser.config, False)
        return {"modelspec.architecture": f"{name}/lora"}

    def rounded_time(self, t: Tensor) -> Tensor:
        """Return noise levels in the network's precision, as FLUX's pipelines round them, (B,).

        1000 t is rounded before the division: to multiples of 4 above 512 in bfloat16.
        """
        return (STEPS * t).float().to(self.dtype) / STEPS

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of images are multiples of: a token's side."""
        return self.pixels_per_latent * self.PATCH
