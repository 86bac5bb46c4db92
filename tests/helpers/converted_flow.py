"""A UNet that predicts the noise, read as a rectified flow: the toy world's is a trained one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import LevelDraw
from lit_prefopt.toy.backbone import CHECKPOINT


class ConvertedFlow(StableDiffusion):
    """A flow whose noised latents are those of the UNet's own process, but for their scale.

    Args:
        pretrained: Folder of the UNet's pipeline.
        levels: Distribution of the noise levels.
    """

    sign = 1.0
    """-1 predicts the negative velocity."""

    def __init__(
        self, pretrained: str = str(CHECKPOINT), levels: LevelDraw | None = None, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, **kwargs)
        self.alphas = self.process.scheduler.alphas_cumprod.double()
        self.process: Any = RectifiedFlow({"shift": 3.0}, levels)
        self.own_time: Callable[[Tensor], Tensor] = lambda t: t
        """Level of the time that is passed, for networks of another convention."""

    def predict(self, latents: Tensor, t: Tensor, prompt: Any) -> Tensor:
        """Return the velocity of the predicted noise."""
        sigma = self.own_time(t).clamp(1e-3, 0.93)  # as noisy as the UNet's process gets
        scale = ((1 - sigma).square() + sigma.square()).sqrt()
        step = (self.alphas - ((1 - sigma) / scale).square()[:, None]).abs().argmin(1)
        wide, size = (x.float().view(-1, 1, 1, 1) for x in (sigma, scale))
        noise = super().predict(latents / size, step, prompt).float()
        return self.sign * (noise - (latents - wide * noise) / (1 - wide))
