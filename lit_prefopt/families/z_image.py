"""Z-Image: a transformer of one stream, and a language model, Qwen3."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.qwen_encoder_names import qwen3_layouts
from lit_prefopt.families.stable_diffusion import VAE
from lit_prefopt.families.z_image_names import transformer_layouts

Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
    ),
    denoiser=Component(
        "transformer",
        "ZImageTransformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=replace(VAE, prefixes=("vae.", "first_stage_model.", "")),
    encoders=(
        Component(
            "text_encoder",
            "Qwen3Model",
            ("text_encoders.qwen3_4b.", "text_encoder.", ""),
            qwen3_layouts,
            package="transformers",
            kohya="lora_te",
            comfyui="text_encoders.qwen3_4b.transformer.",
        ),
    ),
    backbone="ZImage",
    architecture=lambda config, v: "z-image",
    kohya_version=lambda config, v: "z-image",
    noise="flow",
    scale="shift",
    whole_files=False,
    one_alpha=False,
)
