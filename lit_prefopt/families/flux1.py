"""FLUX.1: a transformer of double and single blocks, CLIP and T5."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.flux1_names import transformer_layouts
from lit_prefopt.families.ldm_layouts import clip_layouts
from lit_prefopt.families.stable_diffusion import VAE
from lit_prefopt.families.stable_diffusion_3 import t5_layouts

FLUX1 = Family(
    name="flux1",
    title="FLUX.1",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
    ),
    denoiser=Component(
        "transformer",
        "FluxTransformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=replace(VAE, prefixes=("vae.", "first_stage_model.", "")),
    encoders=(
        Component(
            "text_encoder",
            "CLIPTextModel",
            ("text_encoders.clip_l.", "text_encoder.", ""),
            clip_layouts,
            package="transformers",
            kohya="lora_te1",
            comfyui="text_encoders.clip_l.transformer.",
        ),
        Component(
            "text_encoder_2",
            "T5EncoderModel",
            ("text_encoders.t5xxl.", "text_encoder_2.", ""),
            t5_layouts,
            package="transformers",
            kohya="lora_te3",
            comfyui="text_encoders.t5xxl.transformer.",
            roles=("text_encoder_2", "text_encoder_3"),
        ),
    ),
    backbone="Flux1",
    architecture=lambda config, v: "flux1",
    kohya_version=lambda config, v: "flux1",
    noise="flow",
    scale="shift",
    packed=4,
    whole_files=False,
    one_alpha=False,
)
