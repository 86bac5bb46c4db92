"""Chroma: FLUX.1's blocks, modulated by one small network, and T5 alone."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Family
from lit_prefopt.families.chroma_names import transformer_layouts
from lit_prefopt.families.flux1 import FLUX1, OUTSIDE

CHROMA = Family(
    name="chroma",
    title="Chroma",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    denoiser=replace(
        FLUX1.denoiser, class_name="ChromaTransformer2DModel", layouts=transformer_layouts
    ),
    vae=FLUX1.vae,
    encoders=(
        replace(
            FLUX1.encoders[1],
            name="text_encoder",
            prefixes=("text_encoders.t5xxl.", "text_encoder.", ""),
            roles=("text_encoder", "text_encoder_3"),
        ),
    ),
    backbone="Chroma",
    compared=(
        *("in_channels", "num_layers", "num_single_layers", "num_attention_heads"),
        *("attention_head_dim", "joint_attention_dim"),
        *("approximator_num_channels", "approximator_hidden_dim", "approximator_layers"),
    ),
    # as kohya's sd-scripts writes them
    architecture=lambda config, v: "chroma",
    kohya_version=lambda config, v: "chroma",
    kohya_module="networks.lora_flux",
    noise="flow",
    scale="shift",
    packed=4,
    whole_files=False,
    comfyui_halves=("lora_down", "lora_up"),  # diffusers 0.42 reads nothing of the other form
    one_alpha=False,
    unread={"kohya": OUTSIDE, "comfyui": OUTSIDE},
    refused=("distilled_guidance_layer.",),
    stated={r"chroma.*": "Chroma"},
    lora_targets=FLUX1.lora_targets,  # layers of the same names
)
