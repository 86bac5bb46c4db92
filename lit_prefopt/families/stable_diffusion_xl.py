"""SDXL: a UNet and two text encoders."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.ldm_layouts import open_clip_first
from lit_prefopt.families.stable_diffusion import CLIP_L, COMPARED, UNET, VAE

SDXL = Family(
    name="sdxl",
    title="SDXL",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    denoiser=UNET,
    vae=VAE,
    encoders=(
        replace(
            CLIP_L,
            prefixes=("conditioner.embedders.0.", "cond_stage_model.", "text_encoder.", ""),
            kohya="lora_te1",
        ),
        Component(
            "text_encoder_2",
            "CLIPTextModelWithProjection",
            ("conditioner.embedders.1.", "text_encoder_2.", ""),
            open_clip_first,
            package="transformers",
            kohya="lora_te2",
            comfyui="text_encoders.clip_g.transformer.",
        ),
    ),
    backbone="StableDiffusionXL",
    compared=COMPARED,
    architecture=lambda config, v: "stable-diffusion-xl-v1-base",
    kohya_version=lambda config, v: "sdxl_base_v1-0",
    unread={"comfyui": ("",)},
    stated={r"(stablediffusionxl|sdxl)(?!.*refiner).*": "SDXL"},
)
