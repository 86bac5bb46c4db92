"""Stable Diffusion 3.5 medium at full size, without weights, and batches as from its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from lit_prefopt.batches import LatentPairs
from lit_prefopt.conditioning import Prompt

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


def sd35_configs(folder: Path, **changes: object) -> Path:
    """Write the configurations of a Stable Diffusion 3.5 medium pipeline, without its weights.

    Args:
        folder: Where to write.
        **changes: Changes to the transformer.
    """
    with torch.device("meta"):
        SD3Transformer2DModel(**SD35_MEDIUM | changes).save_config(folder / "transformer")
        AutoencoderKL(**SD35_VAE).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def random_pairs(
    changes: dict[str, object], rows: int, side: int, seed: int, device: str = "cpu"
) -> LatentPairs:
    """Return a batch as from a cache.

    Args:
        changes: Changes to the transformer.
        rows: Number of pairs.
        side: Of the latents.
        seed: Of the random numbers.
        device: Of all tensors but the seeds.
    """
    config, random = SD35_MEDIUM | changes, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, torch.bfloat16)

    prompt = Prompt(
        {
            "hidden": draw(rows, SD35_TOKENS, config["joint_attention_dim"]),
            "pooled": draw(rows, config["pooled_projection_dim"]),
        }
    )
    ones, seeds = torch.ones(rows, device=device), torch.arange(rows) + seed
    latents, texts = draw(rows, 2, 16, side, side), ["a"] * rows
    return LatentPairs(latents, None, prompt, texts, seeds, ones, ones, ["key"] * rows)
