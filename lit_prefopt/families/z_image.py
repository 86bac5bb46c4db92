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
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    denoiser=Component(
        "transformer",
        "ZImageTransformer2DModel",
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
            "Qwen3Model",
            ("text_encoders.qwen3_4b.", "text_encoder.", ""),
            qwen3_layouts,
            package="transformers",
            kohya="lora_te",
            comfyui="text_encoders.qwen3_4b.transformer.",
        ),
    ),
    backbone="ZImage",
    noise="flow",
    scale="shift",
    compared=(
        *("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "qk_norm"),
        *("cap_feat_dim", "siglip_feat_dim", "axes_dims"),
    ),
    # as kohya's musubi-tuner writes them
    architecture=lambda config, v: "Z-Image",
    kohya_version=lambda config, v: "z_image",
    kohya_module="networks.lora_zimage",
    comfyui_original=False,  # as most trainers write them; diffusers 0.42 drops fused layers
    whole_files=False,
    one_alpha=False,
    unread={"kohya": ("all_x_embedder", "all_final_layer")},
    # some trainers state the family whose architecture it shares; no layer fits both models
    stated={r"zimage.*|lumina2": "Z-Image"},
    lora_targets=(  # of Flow-Factory's Z-Image: all layers of attention and feed-forward
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
)
