"""Small Lumina Image 2.0 pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.helpers.tiny_z_image import tiny_z_image_vae

WIDTH = 16


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a tokenizer that spells texts letter by letter, other letters byte by byte."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words += [chr(code) for code in range(33, 127)]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, model_max_length=8192)


def tiny_gemma2(tokenizer: GemmaTokenizer, **changes: object) -> Gemma2Model:
    """Return a Gemma 2 of three layers."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return Gemma2Model(Gemma2Config(**config | changes))


def tiny_lumina2_transformer(**changes: object) -> Lumina2Transformer2DModel:
    """Return a transformer of two layers, with norms that are not neutral."""
    config = {
        "sample_size": 8,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (300, 128, 128),
        "cap_feat_dim": WIDTH,
    }
    network = Lumina2Transformer2DModel(**config | changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tiny_lumina2_vae() -> AutoencoderKL:
    """Return a VAE like FLUX.1's, of the factor 8 that the stock pipeline takes for granted."""
    return tiny_z_image_vae(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def tiny_lumina2_pipeline(folder: Path, shift: float = 6.0, **transformer: object) -> Path:
    """Write a whole Lumina Image 2.0 pipeline and return its folder.

    Args:
        folder: Where to write.
        shift: The scheduler's.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    tokenizer = tiny_gemma_tokenizer()
    Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_lumina2_vae(),
        text_encoder=tiny_gemma2(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_lumina2_transformer(**transformer),
    ).save_pretrained(folder)
    return folder
