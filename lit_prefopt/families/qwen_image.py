"""Qwen-Image: a transformer of double blocks, a video VAE, and a language model."""

from __future__ import annotations

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.qwen_encoder_names import qwen25_vl_layouts
from lit_prefopt.families.qwen_image_names import autoencoder_layouts, transformer_layouts

QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
    ),
    denoiser=Component(
        "transformer",
        "QwenImageTransformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=Component(
        "vae", "AutoencoderKLQwenImage", ("vae.", "first_stage_model.", ""), autoencoder_layouts
    ),
    encoders=(
        Component(
            "text_encoder",
            "Qwen2_5_VLForConditionalGeneration",
            ("text_encoders.qwen25_7b.", "text_encoder.", ""),
            qwen25_vl_layouts,
            package="transformers",
            kohya="lora_te",
            comfyui="text_encoders.qwen25_7b.transformer.",
        ),
    ),
    backbone="QwenImage",
    architecture=lambda config, v: "qwen-image",
    kohya_version=lambda config, v: "qwen-image",
    noise="flow",
    scale="channel",
    packed=4,
    whole_files=False,
    one_alpha=False,
)
