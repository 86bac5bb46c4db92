"""Flow transformers at full size, by their configurations alone, and batches as from a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lit_prefopt import backbones
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.batches import LatentPairs
from lit_prefopt.conditioning import Prompt, Text
from lit_prefopt.ragged import Ragged

WORDS = 100
"""Tokens of a prompt, where prompts are not padded."""


class FullSize(NamedTuple):
    """A model by its configurations.

    Args:
        backbone: Its class in `lit_prefopt.backbones`.
        transformer: Settings of its transformer that differ from its class's defaults.
        vae: Settings of its VAE.
        scheduler: Settings of its scheduler.
        tokens: Tokens of a prompt; None where each has a length of its own.
        tiny: Settings of a small transformer.
        width: Setting of the width of the text.
    """

    backbone: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int | None
    tiny: dict[str, Any]
    width: str = "joint_attention_dim"

    @property
    def kind(self) -> type[TransformerBackbone]:
        """Class of the backbone."""
        found: type[TransformerBackbone] = getattr(backbones, self.backbone)
        return found


SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD35_TOKENS = 77 + 256
"""Tokens of a prompt of Stable Diffusion 3.5: those of the CLIPs, and of T5."""
SD35_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_VAE = SD35_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
TINY_FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}

FULL_SIZE: dict[str, FullSize] = {
    "sd35-medium": FullSize(
        "StableDiffusion3",
        SD35_MEDIUM,
        SD35_VAE,
        {"shift": 3.0},
        SD35_TOKENS,
        {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128}
        | {"dual_attention_layers": (0,)},
    ),
    "flux2-klein-4b": FullSize(
        "Flux2Klein",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
        | {"joint_attention_dim": 3 * 2560, "guidance_embeds": False},
        {},
        DYNAMIC,
        512,
        TINY_FLUX,
    ),
    "flux2-klein-9b": FullSize(
        "Flux2Klein",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
        | {"joint_attention_dim": 3 * 4096, "guidance_embeds": False},
        {},
        DYNAMIC,
        512,
        TINY_FLUX,
    ),
    "z-image": FullSize(
        "ZImage",
        {},
        FLUX_VAE,
        {"shift": 6.0},
        None,
        {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2},
        "cap_feat_dim",
    ),
    "qwen-image": FullSize(
        "QwenImage",
        {},
        {},
        DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        None,
        {"num_layers": 2, "num_attention_heads": 2},
    ),
    "flux1": FullSize(
        "Flux1",
        {"guidance_embeds": True},
        FLUX_VAE,
        DYNAMIC,
        512,
        TINY_FLUX,
    ),
    "chroma": FullSize(
        "Chroma",
        {},
        FLUX_VAE,
        {},
        512,
        TINY_FLUX | {"approximator_hidden_dim": 64, "approximator_layers": 1},
    ),
}
"""Published sizes; what is not stated is the classes' default."""


def write_configs(name: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the configurations of a pipeline, without weights.

    Args:
        name: The model.
        folder: Where to write.
        changes: Changes to the transformer.
    """
    made = FULL_SIZE[name]
    family = made.kind.FAMILY
    with torch.device("meta"):
        family.denoiser.kind(**made.transformer | dict(changes or {})).save_config(
            folder / "transformer"
        )
        getattr(diffusers, family.vae.class_name)(**made.vae).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**made.scheduler).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family.pipelines[0]}))
    return folder


def random_backbone(
    name: str, folder: Path, changes: Mapping[str, Any] | None = None, **options: Any
) -> TransformerBackbone:
    """Return the backbone with random weights, without text encoders.

    Args:
        name: The model.
        folder: Where its configurations are written.
        changes: Changes to the transformer.
        options: Options of the backbone.
    """
    source, kind = write_configs(name, folder, changes), FULL_SIZE[name].kind
    if kind.FAMILY.scale == "batch-norm":  # its statistics are among the VAE's weights
        options["vae"] = str(source / "vae" / "config.json")
    denoiser = str(source / "transformer" / "config.json")
    return kind(str(source), denoiser=denoiser, encoders=False, **options)


def random_pairs(
    name: str, backbone: TransformerBackbone, rows: int, resolution: int, seed: int
) -> LatentPairs:
    """Return a batch as from a cache, on the backbone's device.

    Args:
        name: The model.
        backbone: It, of any size, for the shapes of latents and prompts.
        rows: Number of pairs.
        resolution: Side of the images in pixels.
        seed: Of the random numbers.
    """
    random, device = torch.Generator().manual_seed(seed), next(backbone.parameters()).device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cpu").to(device, torch.bfloat16)

    side, tokens = resolution // backbone.pixels_per_latent, FULL_SIZE[name].tokens
    config = backbone.policy.denoiser.config
    width = config[FULL_SIZE[name].width]
    text: dict[str, Text] = {
        "hidden": draw(rows, tokens, width)
        if tokens
        else Ragged(draw(rows * WORDS, width), (WORDS,) * rows)
    }
    if "pooled_projection_dim" in config:
        text["pooled"] = draw(rows, config["pooled_projection_dim"])
    if name == "chroma":
        text["mask"] = (torch.arange(512, device=device) <= WORDS).repeat(rows, 1)
    ones, seeds = torch.ones(rows, device=device), torch.arange(rows, device="cpu") + seed
    latents, texts = draw(rows, 2, backbone.latent_shape[0], side, side), ["a"] * rows
    return LatentPairs(latents, None, Prompt(text), texts, seeds, ones, ones, ["key"] * rows)
