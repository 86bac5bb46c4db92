"""FLUX.1: a transformer of double and single blocks, CLIP and T5."""

from __future__ import annotations

from dataclasses import replace

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.flux1_names import transformer_layouts
from lit_prefopt.families.ldm_layouts import clip_layouts
from lit_prefopt.families.stable_diffusion import VAE
from lit_prefopt.families.stable_diffusion_3 import t5_layouts

OUTSIDE = ("context_embedder", "norm_out", "proj_out", "time_text_embed", "x_embedder")
"""Modules outside of the blocks."""

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
    compared=(
        *("in_channels", "num_layers", "num_single_layers", "num_attention_heads"),
        *("attention_head_dim", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
    ),
    architecture=lambda config, v: f"flux-1-{'dev' if config['guidance_embeds'] else 'schnell'}",
    kohya_version=lambda config, v: "flux1",
    kohya_module="networks.lora_flux",
    noise="flow",
    scale="shift",
    packed=4,
    whole_files=False,
    comfyui_halves=("lora_down", "lora_up"),  # diffusers 0.42 reads nothing of the other form
    one_alpha=False,
    unread={"kohya": OUTSIDE, "comfyui": OUTSIDE},
    stated={r"flux1.*|flux(dev|schnell|krea|kontext).*": "FLUX.1"},
    # those of diffusers' train_dreambooth_lora_flux.py and of flow_grpo's train_flux.py; the names
    # of attention are also those of single blocks
    lora_targets=(
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
)
