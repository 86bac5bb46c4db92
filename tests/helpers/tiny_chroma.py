"""Small Chroma pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.helpers.tiny_flux1 import tiny_flux1_vae
from tests.helpers.tiny_sd3 import JOINT_WIDTH, tiny_t5, tiny_t5_tokenizer

SCHEDULER = {"shift": 1.0}
"""Scheduler of Chroma1-HD: no shift (https://github.com/huggingface/diffusers/issues/12112)."""


def tiny_chroma_transformer(**changes: object) -> ChromaTransformer2DModel:
    """Return a transformer of one double and two single blocks."""
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": JOINT_WIDTH,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 24,
        "approximator_layers": 2,
    }
    return ChromaTransformer2DModel(**config | changes)


def tiny_chroma_pipeline(
    folder: Path, scheduler: dict[str, object] = SCHEDULER, **transformer: object
) -> Path:
    """Write a whole Chroma pipeline and return its folder.

    Args:
        folder: Where to write.
        scheduler: Settings of its scheduler.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    tokenizer = tiny_t5_tokenizer()
    ChromaPipeline(
        vae=tiny_flux1_vae(),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_chroma_transformer(**transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    ).save_pretrained(folder)
    return folder
