"""Stable Diffusion 1.x and 2.x: a UNet and one text encoder."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.ldm_layouts import (
    clip_first,
    open_clip_first,
    unet_layouts,
    vae_layouts,
)

UNET = Component(
    "unet",
    "UNet2DConditionModel",
    ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    unet_layouts,
    guidance=("time_cond_proj_dim", "time_embedding.cond_proj.weight"),
    kohya="lora_unet",
    comfyui="diffusion_model.",
)
VAE = Component("vae", "AutoencoderKL", ("first_stage_model.", "vae.", ""), vae_layouts)
CLIP_L = Component(
    "text_encoder",
    "CLIPTextModel",
    ("cond_stage_model.", "conditioner.embedders.0.", "text_encoder.", ""),
    clip_first,
    package="transformers",
    kohya="lora_te",
    comfyui="text_encoders.clip_l.transformer.",
)
COMPARED = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")

MODELS = {"768": "Stable Diffusion 1.x", "1024": "Stable Diffusion 2.x"}
"""Titles by the width of the prompts."""

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
    ),
    denoiser=UNET,
    vae=VAE,
    encoders=(CLIP_L,),
    backbone="StableDiffusion",
    compared=COMPARED,
    architecture=lambda config, v: "stable-diffusion-v1",
    kohya_version=lambda config, v: "sd_v1" + ("_v" if v else ""),
    kohya_original=False,
    unread={"comfyui": ("",)},
    stated={rf"(stablediffusion|sd)v?{n}.*": f"Stable Diffusion {n}.x" for n in (1, 2)},
    model=lambda config: MODELS.get(str(config["cross_attention_dim"]), ""),
    is_own=lambda text: text.get("hidden_act") != "gelu",
    distilled_pipeline="LatentConsistencyModelPipeline",
    distilled_backbone="LatentConsistency",
)

SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    encoders=(
        replace(CLIP_L, layouts=open_clip_first, comfyui="text_encoders.clip_h.transformer."),
    ),
    architecture=lambda config, v: f"stable-diffusion-v2-{'768-v' if v else '512'}",
    kohya_version=lambda config, v: "sd_v2" + ("_v" if v else ""),
    kohya_v2=True,
    # OpenCLIP's text encoder, that of SD 2.x, has a plain GELU
    is_own=lambda text: text.get("hidden_act") == "gelu",
)
