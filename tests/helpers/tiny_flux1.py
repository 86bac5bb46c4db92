"""Small FLUX.1 pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel

from tests.helpers.tiny import tiny_text_config, tiny_tokenizer
from tests.helpers.tiny_sd3 import JOINT_WIDTH, tiny_sd3_vae, tiny_t5, tiny_t5_tokenizer

CLIP_TOKENS = 77
DYNAMIC = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""Scheduler of FLUX.1 dev."""


def tiny_flux1_transformer(**changes: object) -> FluxTransformer2DModel:
    """Return a transformer of one double and two single blocks."""
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": JOINT_WIDTH,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**config | changes)


def tiny_flux1_vae(**changes: object) -> AutoencoderKL:
    """Return a VAE of 16 channels with the published scale and shift, without quant layers."""
    return tiny_sd3_vae(**{"scaling_factor": 0.3611, "shift_factor": 0.1159} | changes)


def tiny_flux1_pipeline(folder: Path, **transformer: object) -> Path:
    """Write a whole FLUX.1 dev pipeline and return its folder.

    Args:
        folder: Where to write.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    return _write(folder, tiny_flux1_transformer(**transformer), DYNAMIC)


def tiny_flux1_schnell_pipeline(folder: Path) -> Path:
    """Write a whole FLUX.1 schnell pipeline, without guidance embedding and shift."""
    torch.manual_seed(0)
    return _write(folder, tiny_flux1_transformer(guidance_embeds=False), {"shift": 1.0})


def _write(folder: Path, transformer: FluxTransformer2DModel, scheduler: dict[str, object]) -> Path:
    first = tiny_tokenizer(folder / "made-from", CLIP_TOKENS)
    second = tiny_t5_tokenizer()
    text = tiny_text_config(first, max_position_embeddings=CLIP_TOKENS)
    FluxPipeline(
        vae=tiny_flux1_vae(),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=tiny_t5(second),
        tokenizer=first,
        tokenizer_2=second,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    ).save_pretrained(folder)
    return folder
