"""Small pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_prefopt.toy.assemble import SCHEDULER, save_pipeline


def tiny_tokenizer(folder: Path, length: int = 16) -> CLIPTokenizer:
    """Return a CLIP tokenizer that spells every word letter by letter."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: i for i, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def tiny_unet() -> UNet2DConditionModel:
    """Return a UNet of some 100 thousand parameters for 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def tiny_pipeline(folder: Path, prediction: str = "epsilon") -> Path:
    """Write a whole Stable Diffusion pipeline and return its folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "made-from")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=32,
    )
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    save_pipeline(folder, vae, text, tokenizer, tiny_unet(), scheduler)
    return folder
