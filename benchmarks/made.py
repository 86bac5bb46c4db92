"""Backbones of full size whose weights are shapes alone, so that they take no memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks.common import CLIP_G, CLIP_L, FULL_SIZE_VAE, SDXL_UNET, default_dtype
from lit_prefopt.backbones import StableDiffusion, StableDiffusion3, StableDiffusionXL, latent
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.backbones.loading import Components
from lit_prefopt.toy.assemble import SCHEDULER
from tests.helpers.full_size import SD35_MEDIUM, SD35_VAE
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer, tiny_unet, tiny_vae, tiny_xl_unet
from tests.helpers.tiny_sd3 import (
    SD35,
    tiny_sd3_transformer,
    tiny_sd3_vae,
    tiny_t5,
    tiny_t5_tokenizer,
)

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
WIDE = {"projection_dim": 20, "hidden_act": "gelu"}
EPSILON = {**SCHEDULER, "prediction_type": "epsilon"}
FLOW = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
POSITIONS = {"max_position_embeddings": 77}

Make = Callable[[], Any]


class Made(NamedTuple):
    """How a family is made."""

    kind: type[LatentBackbone]
    denoiser: Make
    vae: Make
    clips: list[tuple[type[nn.Module], dict[str, Any]]]  # classes, and what their size is
    tokens: int
    scheduler: dict[str, Any] = EPSILON
    t5: Callable[[Any], nn.Module] | None = None


def _t5_xxl(tokenizer: Any) -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5_XXL))


def _vae(**changes: Any) -> Make:
    return lambda: AutoencoderKL(**FULL_SIZE_VAE | changes)


TEXT, PROJECTED = CLIPTextModel, CLIPTextModelWithProjection
MADE = {
    "tiny": Made(StableDiffusion, tiny_unet, tiny_vae, [(TEXT, {})], 16),
    "tiny-xl": Made(
        StableDiffusionXL,
        tiny_xl_unet,
        tiny_vae,
        [(TEXT, {}), (PROJECTED, {"hidden_size": 24, **WIDE})],
        16,
    ),
    "tiny-sd35": Made(
        StableDiffusion3,
        lambda: tiny_sd3_transformer(**SD35),
        tiny_sd3_vae,
        [
            (PROJECTED, {"projection_dim": 16, **POSITIONS}),
            (PROJECTED, {"hidden_size": 24, **WIDE, **POSITIONS}),
        ],
        77,
        FLOW,
        tiny_t5,
    ),
    "sd15": Made(
        StableDiffusion,
        lambda: UNet2DConditionModel(**SD15_UNET),
        _vae(sample_size=512),
        [(TEXT, CLIP_L)],
        77,
    ),
    "sdxl": Made(
        StableDiffusionXL,
        lambda: UNet2DConditionModel(**SDXL_UNET),
        _vae(sample_size=1024),
        [(TEXT, CLIP_L), (PROJECTED, CLIP_G)],
        77,
    ),
    "sd35": Made(
        StableDiffusion3,
        lambda: SD3Transformer2DModel(**SD35_MEDIUM),
        _vae(**SD35_VAE),
        [(PROJECTED, {**CLIP_L, "projection_dim": 768}), (PROJECTED, CLIP_G)],
        77,
        FLOW,
        _t5_xxl,
    ),
}


class MadeComponents(Components):
    """Parts on the meta device.

    Args:
        made: How they are made.
        folder: Where tokenizers are written.
    """

    def __init__(self, made: Made, folder: Path) -> None:
        super().__init__(made.kind.FAMILY, "made")
        self.made, self.folder = made, folder

    def scheduler(self) -> dict[str, Any]:
        """Return the family's schedule."""
        return dict(self.made.scheduler)

    def option(self, name: str, default: Any) -> Any:
        """Return what is usual."""
        return default

    def denoiser(self, dtype: torch.dtype) -> Any:
        """Return the denoiser."""
        return on_meta(self.made.denoiser, dtype)

    def denoiser_config(self) -> dict[str, Any]:
        """Return the denoiser's configuration."""
        return dict(self.denoiser(torch.float32).config)

    @property
    def has_vae(self) -> bool:
        """Whether there is a VAE."""
        return True

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the VAE."""
        return on_meta(self.made.vae, dtype)

    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's configuration."""
        return dict(self.vae(torch.float32).config)

    def has_encoder(self, name: str) -> bool:
        """Whether there is a text encoder of a name."""
        return True

    def text_encoder(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Return a text encoder."""
        number = self._number(name)
        tokenizer = self.tokenizer(name)
        if number == len(self.made.clips):
            assert self.made.t5 is not None
            t5 = self.made.t5
            return on_meta(lambda: t5(tokenizer).eval(), dtype)
        kind, sizes = self.made.clips[number]
        config = tiny_text_config(tokenizer, **sizes)
        return on_meta(lambda: kind(config).eval(), dtype)

    def tokenizer(self, name: str, kind: Any = None) -> Any:
        """Return a tokenizer."""
        if self._number(name) == len(self.made.clips):
            return tiny_t5_tokenizer()
        return tiny_tokenizer(self.folder / name, length=self.made.tokens)

    @staticmethod
    def _number(name: str) -> int:
        """Return the place of a text encoder or tokenizer: 0, 1 or 2."""
        end = name.rpartition("_")[2]
        return int(end) - 1 if end.isdigit() else 0


def on_meta(make: Make, dtype: torch.dtype) -> Any:
    """Return what is made without memory, in a precision."""
    with torch.device("meta"), default_dtype(dtype):
        return make()


def made_backbone(family: str, folder: Path, **options: Any) -> LatentBackbone:
    """Return a backbone on the meta device.

    Args:
        family: Its name in `MADE`.
        folder: Where tokenizers are written.
        **options: Further arguments of the backbone.
    """
    made = MADE[family]
    parts = MadeComponents(made, folder)
    with patch.object(latent, "open_components", lambda *_, **__: parts):
        return made.kind(str(folder), **options)


def without_numbers(network: nn.Module) -> nn.Module:
    """Return the network with weights of the same shapes that an active FakeTensorMode pretends."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network
