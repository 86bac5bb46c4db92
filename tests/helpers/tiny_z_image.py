"""Small Z-Image pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.helpers.tiny import tiny_vae
from tests.helpers.tiny_flux2 import TEMPLATE, tiny_qwen_tokenizer

WIDTH = 16


def tiny_qwen3(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Qwen3Model:
    """Return a Qwen3 of three layers."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return Qwen3Model(Qwen3Config(**config | changes))


def tiny_z_image_transformer(**changes: object) -> ZImageTransformer2DModel:
    """Return a transformer of two layers, with pad tokens and norms that are not neutral."""
    config = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1024, 128, 128],
    }
    network = ZImageTransformer2DModel(**config | changes)
    with torch.no_grad():
        for pad in (network.x_pad_token, network.cap_pad_token):
            pad.normal_()  # zeros in a fresh network
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tiny_z_image_vae(**changes: object) -> AutoencoderKL:
    """Return a VAE of 16 channels with FLUX.1's scale and shift, without quant layers."""
    config = {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return tiny_vae(**config | changes)


def tiny_z_image_pipeline(
    folder: Path, shift: float = 6.0, template: str | None = TEMPLATE, **transformer: object
) -> Path:
    """Write a whole Z-Image pipeline and return its folder.

    Args:
        folder: Where to write.
        shift: The scheduler's: 6 for Z-Image, 3 for Z-Image-Turbo.
        template: The tokenizer's chat template.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer(template)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_z_image_vae(),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_z_image_transformer(**transformer),
    ).save_pretrained(folder)
    return folder
