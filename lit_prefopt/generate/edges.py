"""Edge control: a ControlNet that conditions both panels of a diptych on the same edges."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from lit_prefopt.backbones import Backbone
from lit_prefopt.backbones.latent import DType
from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.errors import InputError, check_number


class EdgeControl(nn.Module):
    """Conditions images on edges by a ControlNet (arXiv 2302.05543) in diffusers' layout.

    Args:
        controlnet: Hub name or folder of a ControlNet of the backbone's family that was trained on
            edges.
        scale: Weight of its residuals in the UNet.
        low: Canny's low threshold, for edges connected to a strong one, in kornia's units; a
            sharp step from black to white has 2.6.
        high: Canny's high threshold, for strong edges.
        dtype: Precision of its weights.
    """

    net: Any  # Any: diffusers is untyped

    def __init__(
        self,
        controlnet: str,
        scale: float = 1.0,
        low: float = 0.25,
        high: float = 0.5,
        dtype: DType = "float32",
    ) -> None:
        super().__init__()
        check_number("scale", scale, above=0)
        check_number("low", low, 0, 1)
        check_number("high", high, low, 1)
        self.net = freeze(
            load_component(ControlNetModel, controlnet, "controlnet", getattr(torch, dtype))
        )
        self.scale, self.low, self.high = scale, low, high

    def settings(self) -> dict[str, float]:
        """Return its numeric settings."""
        return {"scale": self.scale, "low": self.low, "high": self.high}

    def check(self, backbone: Backbone) -> None:
        """Check that the backbone has a UNet, and that its shapes match the ControlNet's."""
        names = ("cross_attention_dim", "block_out_channels", "addition_embed_type")
        unet = _with_unet(backbone).policy.denoiser.config
        if all(_plain(unet[name]) == _plain(self.net.config[name]) for name in names):
            return
        raise InputError(
            f"The ControlNet does not fit {type(backbone).__name__} of this size: name one of "
            "the backbone's family with `--model.control.controlnet`."
        )

    def edges(self, images: Tensor) -> Tensor:
        """Return white edges on black, (B, 3, H, W) in [0, 1].

        Args:
            images: (B, 3, H, W) in [-1, 1].
        """
        return edges(images, self.low, self.high)

    @contextmanager
    def condition_on(self, backbone: Backbone, drawing: Tensor) -> Iterator[None]:
        """Condition the UNet on these edges inside the block.

        Args:
            backbone: Its `predict` gets the ControlNet's residuals.
            drawing: (B, 3, H, W) in [0, 1], for forwards of B rows or multiples of them.
        """
        conditioned = _with_unet(backbone)

        def residuals(latents: Tensor, t: Tensor, conditioning: dict[str, Any]) -> dict[str, Any]:
            times = len(latents) // len(drawing)
            dtype = self.net.dtype
            down, middle = self.net(
                latents.to(dtype),
                t,
                **{name: _cast(value, dtype) for name, value in conditioning.items()},
                controlnet_cond=drawing.to(latents.device, dtype).repeat(times, 1, 1, 1),
                conditioning_scale=self.scale,
                return_dict=False,
            )
            return {
                "down_block_additional_residuals": [x.to(latents.dtype) for x in down],
                "mid_block_additional_residual": middle.to(latents.dtype),
            }

        conditioned.extra_conditioning = residuals
        try:
            yield
        finally:
            conditioned.extra_conditioning = None


def edges(images: Tensor, low: float, high: float) -> Tensor:
    """Return the Canny edges of images (J. Canny, 1986), (B, 3, H, W) of zeros and ones.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        low: Low threshold, for edges connected to a strong one.
        high: High threshold, for strong edges.

    Raises:
        InputError: kornia is not installed.
    """
    try:
        canny = importlib.import_module("kornia.filters").canny
    except ImportError as error:
        raise InputError(
            "Edge detection needs kornia: `pip install lit-prefopt[edges]`, or omit "
            "`--model.control`."
        ) from error
    found: Tensor = canny((images.float() + 1) / 2, low, high)[1]
    return found.repeat(1, 3, 1, 1)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors to a dtype, also those in a dictionary."""
    if isinstance(value, dict):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _with_unet(backbone: Backbone) -> UNetBackbone:
    """Return the backbone, which must have a UNet.

    Raises:
        InputError: It has none.
    """
    if isinstance(backbone, UNetBackbone):
        return backbone
    raise InputError(
        f"Edges condition a UNet, which {type(backbone).__name__} does not have: remove "
        "`model.control`, or take the backbone StableDiffusion or StableDiffusionXL."
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
