"""FLUX.2 klein: a transformer of double and single blocks, and a language model, Qwen3."""

from __future__ import annotations

from lit_prefopt.families.base import Component, Config, Family
from lit_prefopt.families.flux2_names import autoencoder_layouts, transformer_layouts
from lit_prefopt.families.qwen_encoder_names import qwen3_layouts


def _size(config: Config) -> str:
    """Return the size of the model: 24 heads of attention have 4 billion parameters, 32 have 9."""
    return "4b" if config["num_attention_heads"] <= 24 else "9b"


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
    # as musubi-tuner, kohya's trainer of this family, names them
    architecture=lambda config, v: f"Flux.2-klein-{_size(config)}",
    kohya_version=lambda config, v: f"flux_2_klein_{_size(config)}",
    kohya_module="networks.lora_flux_2",
    noise="flow",
    scale="batch-norm",
    packed=4,
    compared=(
        *("in_channels", "num_layers", "num_single_layers", "num_attention_heads"),
        *("attention_head_dim", "joint_attention_dim", "axes_dims_rope", "guidance_embeds"),
    ),
    whole_files=False,
    one_alpha=False,
    unread={
        "kohya": (
            *("double_stream_modulation_img", "double_stream_modulation_txt"),
            *("single_stream_modulation", "norm_out"),
        ),
        "comfyui": ("",),  # refused, since it has alphas
    },
    stated={rf"flux2klein(base)?{size}.*": f"FLUX.2 klein {size.upper()}" for size in ("4b", "9b")},
    model=lambda config: f"FLUX.2 klein {_size(config).upper()}",
    # of diffusers' train_dreambooth_lora_flux2_klein.py; `attn.to_out` is of the single blocks
    lora_targets=("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"),
)
