"""Small pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from lit_prefopt.toy.assemble import SCHEDULER, save_pipeline


def tiny_tokenizer(folder: Path, length: int = 16, **options: str) -> CLIPTokenizer:
    """Return a CLIP tokenizer that spells every word letter by letter."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: i for i, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=length,
        **options,
    )


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """Return a UNet of some 100 thousand parameters for 8 x 8 latents."""
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**config | changes)


def tiny_xl_unet(**changes: object) -> UNet2DConditionModel:
    """Return a UNet of SDXL's form: two encoders' width, pooled text and six sizes."""
    config = {
        "cross_attention_dim": 32 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    return tiny_unet(**config | changes)


def tiny_text_config(tokenizer: CLIPTokenizer, **changes: object) -> CLIPTextConfig:
    """Return the configuration of a text encoder of two layers."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**config | changes)


def tiny_clip(folder: Path) -> Path:
    """Write a whole CLIP of two layers for 32 x 32 pixels, with tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = tiny_text_config(tokenizer)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def tiny_vae(**changes: object) -> AutoencoderKL:
    """Return a VAE that makes 8 x 8 latents of 32 x 32 pixels."""
    config = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 32,
    }
    return AutoencoderKL(**config | changes)


def tiny_decoder(folder: Path, **changes: object) -> str:
    """Write an AutoencoderTiny for 8 x 8 latents of 32 x 32 pixels and return its folder."""
    torch.manual_seed(1)
    config = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    }
    AutoencoderTiny(**config | changes).save_pretrained(folder)
    return str(folder)


def tiny_pipeline(folder: Path, prediction: str = "epsilon", **unet: object) -> Path:
    """Write a whole Stable Diffusion pipeline and return its folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "made-from")
    text = CLIPTextModel(tiny_text_config(tokenizer))
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    save_pipeline(folder, tiny_vae(), text, tokenizer, tiny_unet(**unet), scheduler)
    return folder


def tiny_lcm(folder: Path, prediction: str = "epsilon", **unet: object) -> Path:
    """Write a whole latent consistency model and return its folder."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer(folder / "made-from")
    text = CLIPTextModel(tiny_text_config(tokenizer))
    scheduler = LCMScheduler(**SCHEDULER, prediction_type=prediction)
    told = tiny_unet(**{"time_cond_proj_dim": 16} | unet)
    save_pipeline(folder, tiny_vae(), text, tokenizer, told, scheduler)
    return folder


def tiny_xl_pipeline(folder: Path, prediction: str = "epsilon", **unet: object) -> Path:
    """Write a whole SDXL pipeline and return its folder."""
    torch.manual_seed(0)
    first = tiny_tokenizer(folder / "made-from")
    second = tiny_tokenizer(folder / "made-from", pad_token="!")
    wider = {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(tiny_text_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second, **wider)),
        tokenizer=first,
        tokenizer_2=second,
        unet=tiny_xl_unet(**unet),
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
