"""FLUX.2 klein: a transformer of double and single blocks, and a language model, Qwen3."""

from __future__ import annotations

from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.flux2_names import autoencoder_layouts, transformer_layouts
from lit_prefopt.families.qwen_encoder_names import qwen3_layouts

FLUX2 = Family(
    name="flux2",
    title="FLUX.2 klein",
    pipelines=("Flux2KleinPipeline",),
    denoiser=Component(
        "transformer",
        "Flux2Transformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=Component(
        "vae", "AutoencoderKLFlux2", ("vae.", "first_stage_model.", ""), autoencoder_layouts
    ),
    encoders=(
        Component(
            "text_encoder",
            "Qwen3ForCausalLM",
            ("text_encoders.qwen3_4b.", "text_encoders.qwen3_8b.", "text_encoder.", ""),
            qwen3_layouts,
            package="transformers",
            kohya="lora_te",
            comfyui="text_encoders.qwen3_4b.transformer.",
        ),
    ),
    backbone="Flux2Klein",
    architecture=lambda config, v: "flux2",
    kohya_version=lambda config, v: "flux2",
    noise="flow",
    scale="batch-norm",
    packed=4,
    whole_files=False,
    one_alpha=False,
)
