"""Small Stable Diffusion 3 and 3.5 pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.helpers.tiny import tiny_text_config, tiny_tokenizer, tiny_vae

SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
"""What Stable Diffusion 3.5 medium has beyond 3: normed queries, a second attention."""

MISSING_T5 = {"text_encoder_3": None, "tokenizer_3": None}
"""What `from_pretrained` needs for a folder without T5."""

CLIP_TOKENS = 77
JOINT_WIDTH = 64
"""Width of T5, to which the two CLIPs' 32 + 24 are padded."""


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Return a T5 tokenizer that spells ASCII letter by letter; other letters are unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces += [(letter, -3.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Return a T5 encoder of two layers, of the form of T5 1.1."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT_WIDTH,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def tiny_sd3_transformer(**changes: object) -> SD3Transformer2DModel:
    """Return a transformer of some 100 thousand parameters for 8 x 8 latents."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": JOINT_WIDTH,
        "pooled_projection_dim": 16 + 20,
        "pos_embed_max_size": 12,
    }
    network = SD3Transformer2DModel(**config | changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tiny_sd3_vae(**changes: object) -> AutoencoderKL:
    """Return a VAE of 16 channels with the published scale and shift, without quant layers."""
    config = {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return tiny_vae(**config | changes)


def tiny_sd3_pipeline(
    folder: Path, t5: bool = True, shift: float = 3.0, **transformer: object
) -> Path:
    """Write a whole Stable Diffusion 3 pipeline and return its folder.

    Args:
        folder: Where to write.
        t5: Without it `model_index.json` says null for the third encoder and tokenizer, as
            `save_pretrained` of a pipeline without them does; `from_pretrained` then needs
            `text_encoder_3=None, tokenizer_3=None`.
        shift: The scheduler's.
        **transformer: Changes to the transformer; `SD35` makes it one of 3.5.
    """
    torch.manual_seed(0)
    first = tiny_tokenizer(folder / "made-from", CLIP_TOKENS)
    second = tiny_tokenizer(folder / "made-from", CLIP_TOKENS, pad_token="!")
    third = tiny_t5_tokenizer()
    positions = {"max_position_embeddings": CLIP_TOKENS}
    narrow = positions | {"projection_dim": 16}
    wide = positions | {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    parts = {
        "vae": tiny_sd3_vae(),
        "text_encoder": CLIPTextModelWithProjection(tiny_text_config(first, **narrow)),
        "text_encoder_2": CLIPTextModelWithProjection(tiny_text_config(second, **wide)),
        "transformer": tiny_sd3_transformer(**transformer),
        "text_encoder_3": tiny_t5(third),
    }
    if not t5:
        parts["text_encoder_3"] = third = None
    StableDiffusion3Pipeline(
        **parts,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    ).save_pretrained(folder)
    return folder


def tiny_sd35_pipeline(folder: Path, t5: bool = True, **transformer: object) -> Path:
    """Write a whole Stable Diffusion 3.5 pipeline and return its folder."""
    return tiny_sd3_pipeline(folder, t5, **SD35 | transformer)


def load_stock_sd3(folder: Path | str, **options: Any) -> StableDiffusion3Pipeline:
    """Load the stock pipeline of a folder, with or without T5, without a progress bar.

    Args:
        folder: The folder.
        options: Further arguments of `from_pretrained`, such as `torch_dtype`.
    """
    missing = {} if (Path(folder) / "text_encoder_3").is_dir() else MISSING_T5
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **missing, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
