"""Edge control: a ControlNet that holds both panels of a diptych to one drawing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor, nn

from lit_prefopt.backbones import Backbone
from lit_prefopt.backbones.parts import load_part
from lit_prefopt.backbones.reference import freeze
from lit_prefopt.backbones.unet import DType, UNetBackbone
from lit_prefopt.errors import InputError, check_number


class EdgeControl(nn.Module):
    """Draws images along given edges, by a ControlNet (arXiv 2302.05543) in diffusers' layout.

    Args:
        controlnet: Hub name or folder of a ControlNet of the backbone's family that was trained on
            edges.
        scale: Weight of what it adds to the UNet.
        low: Least strength of an edge that goes on from a stronger one; a sharp step from black to
            white has the strength 1.
        high: Least strength of an edge of its own.
        dtype: Precision of its weights.
    """

    net: Any  # Any: diffusers is untyped

    def __init__(
        self,
        controlnet: str,
        scale: float = 1.0,
        low: float = 0.1,
        high: float = 0.2,
        dtype: DType = "float32",
    ) -> None:
        super().__init__()
        check_number("scale", scale, above=0)
        check_number("low", low, 0, 1)
        check_number("high", high, low, 1)
        self.net = freeze(
            load_part(ControlNetModel, controlnet, "controlnet", getattr(torch, dtype))
        )
        self.scale, self.low, self.high = scale, low, high

    def facts(self) -> dict[str, float]:
        """Return its numbers."""
        return {"scale": self.scale, "low": self.low, "high": self.high}

    def check(self, backbone: Backbone) -> None:
        """Refuse a backbone that it was not made for."""
        if isinstance(backbone, UNetBackbone):
            names = ("cross_attention_dim", "block_out_channels", "addition_embed_type")
            unet = backbone.policy.denoiser.config
            if all(_plain(unet[name]) == _plain(self.net.config[name]) for name in names):
                return
        raise InputError(
            f"The ControlNet was not made for {type(backbone).__name__} of this size: name one of "
            "the backbone's family by `--model.control.controlnet`."
        )

    def edges(self, images: Tensor) -> Tensor:
        """Return white edges on black, (B, 3, H, W) in [0, 1].

        Args:
            images: (B, 3, H, W) in [-1, 1].
        """
        return edges(images, self.low, self.high)

    @contextmanager
    def along(self, backbone: Backbone, drawing: Tensor) -> Iterator[None]:
        """Let the UNet predict along these edges inside the block.

        Args:
            backbone: Its `predict` is steered.
            drawing: (B, 3, H, W) in [0, 1], for forwards of B rows or of B rows again and again.
        """
        assert isinstance(backbone, UNetBackbone)

        def steer(latents: Tensor, t: Tensor, told: dict[str, Any]) -> dict[str, Any]:
            times = len(latents) // len(drawing)
            dtype = self.net.dtype
            down, middle = self.net(
                latents.to(dtype),
                t,
                **{name: _cast(value, dtype) for name, value in told.items()},
                controlnet_cond=drawing.to(latents.device, dtype).repeat(times, 1, 1, 1),
                conditioning_scale=self.scale,
                return_dict=False,
            )
            return {
                "down_block_additional_residuals": [x.to(latents.dtype) for x in down],
                "mid_block_additional_residual": middle.to(latents.dtype),
            }

        backbone.steer = steer
        try:
            yield
        finally:
            backbone.steer = None


def edges(images: Tensor, low: float, high: float) -> Tensor:
    """Return the edges of images as J. Canny (1986) finds them, (B, 3, H, W) of zeros and ones.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        low: Least strength of what goes on from a strong edge; 1 is a step from black to white.
        high: Least strength of a strong edge.
    """
    grey = (images.float().mean(1, keepdim=True) + 1) / 2
    smooth = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=grey.device) / 16
    grey = _filtered(_filtered(grey, smooth[None]), smooth[:, None])
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=grey.device) / 4
    across, down = _filtered(grey, slope), _filtered(grey, slope.T)
    # so that a sharp step from black to white, smoothed as above, has the strength 1
    strength = (across.square() + down.square()).sqrt() / 0.625
    # an edge is where the slope is steepest along its own direction
    way = torch.round(torch.atan2(down, across) / (torch.pi / 4)).long() % 4
    around = F.pad(strength, (1, 1, 1, 1))
    height, width = strength.shape[-2:]
    steepest = torch.zeros_like(strength, dtype=torch.bool)
    for number, (x, y) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        ahead = around[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = around[..., 1 - y : 1 - y + height, 1 - x : 1 - x + width]
        steepest |= (way == number) & (strength >= ahead) & (strength > behind)
    weak = (steepest & (strength >= low)).float()
    found = (steepest & (strength >= high)).float()
    while True:  # strong edges grow along weak ones
        grown = torch.minimum(F.max_pool2d(found, 3, stride=1, padding=1), weak)
        if torch.equal(grown, found):
            return found.repeat(1, 3, 1, 1)
        found = grown


def _filtered(images: Tensor, kernel: Tensor) -> Tensor:
    rows, columns = (side // 2 for side in kernel.shape)
    padded = F.pad(images, (columns, columns, rows, rows), "replicate")
    return F.conv2d(padded, kernel[None, None])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return tensors of real numbers in that precision, also those within a dictionary."""
    if isinstance(value, dict):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
