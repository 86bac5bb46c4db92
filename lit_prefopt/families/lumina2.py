"""Lumina Image 2.0: a transformer of one stream, and a language model, Gemma 2."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.lumina2_names import transformer_layouts
from lit_prefopt.families.qwen_encoder_names import qwen3_layouts
from lit_prefopt.families.stable_diffusion import VAE

LUMINA2 = Family(
    name="lumina2",
    title="Lumina Image 2.0",
    pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),  # the second: before diffusers 0.33
    denoiser=Component(
        "transformer",
        "Lumina2Transformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        ignored=("norm_final.weight",),
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=replace(VAE, prefixes=("vae.", "first_stage_model.", "")),
    encoders=(
        Component(
            "text_encoder",
            "Gemma2Model",
            ("text_encoders.gemma2_2b.", "text_encoder.", ""),
            qwen3_layouts,  # files have the same beginnings of Gemma 2's names
            package="transformers",
            ignored=("logit_scale",),
            kohya="lora_te",
            comfyui="text_encoders.gemma2_2b.transformer.",
        ),
    ),
    backbone="Lumina2",
    noise="flow",
    scale="shift",
    compared=(
        *("in_channels", "hidden_size", "num_layers", "num_refiner_layers", "num_attention_heads"),
        *("num_kv_heads", "multiple_of", "ffn_dim_multiplier", "cap_feat_dim", "axes_dim_rope"),
    ),
    # as kohya's sd-scripts write them
    architecture=lambda config, v: "lumina-2",
    kohya_version=lambda config, v: "lumina2",
    kohya_module="networks.lora_lumina",
    whole_files=False,
    one_alpha=False,
    unread={
        "kohya": ("",),
        "comfyui": ("",),  # refused, since it has alphas
    },
    stated={r"lumina(image)?2.*": "Lumina Image 2.0"},
    # all layers of attention and feed-forward, as kohya's lora_lumina.py, without the modulation
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
    ),
)
