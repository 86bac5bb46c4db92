"""Small Qwen-Image pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
"""The published settings of the scheduler that differ from the class's."""

TEXT_WIDTH = 16


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer that spells texts byte by byte, with the tokens of messages."""
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        additional_special_tokens=words[-2:],
        model_max_length=131072,
    )


def tiny_qwen_vl(
    tokenizer: Qwen2Tokenizer, **changes: object
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a Qwen2.5-VL of two layers, with the smallest vision tower."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text | changes, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_qwen_transformer(**changes: object) -> QwenImageTransformer2DModel:
    """Return a transformer of two blocks."""
    config = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (8, 4, 4),
    }
    network = QwenImageTransformer2DModel(**config | changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tiny_qwen_vae(factor: int = 8, **changes: object) -> AutoencoderKLQwenImage:
    """Return a VAE with the published means and deviations of its 16 channels.

    Args:
        factor: Pixels per latent: 4 or, as published, 8.
        **changes: Changes to its configuration.
    """
    down = {4: [False, True], 8: [False, True, True]}[factor]
    config = {
        "base_dim": 4,
        "z_dim": 16,
        "dim_mult": [1] * (len(down) + 1),
        "num_res_blocks": 1,
        "temperal_downsample": down,
    }
    return AutoencoderKLQwenImage(**config | changes)


def tiny_qwen_image_pipeline(folder: Path, factor: int = 8, **transformer: object) -> Path:
    """Write a whole Qwen-Image pipeline and return its folder.

    Args:
        folder: Where to write.
        factor: Pixels per latent.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=tiny_qwen_vae(factor),
        text_encoder=tiny_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_qwen_transformer(**transformer),
    ).save_pretrained(folder)
    return folder
