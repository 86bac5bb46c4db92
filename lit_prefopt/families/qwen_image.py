"""Qwen-Image: a transformer of double blocks, a video VAE, and a language model."""

from __future__ import annotations

from lit_prefopt.families.base import Component, Config, Family
from lit_prefopt.families.qwen_encoder_names import qwen25_vl_layouts
from lit_prefopt.families.qwen_image_names import autoencoder_layouts, transformer_layouts


def last_text(config: Config) -> tuple[str, ...]:
    """Return the last block's layers that compute its text, which nothing follows.

    Args:
        config: The transformer's configuration.
    """
    last = f"transformer_blocks.{config['num_layers'] - 1}"
    ends = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    return tuple(f"{last}.{end}" for end in ends)


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
    architecture=lambda config, v: "Qwen-Image",  # kohya's musubi-tuner, as the next two
    kohya_version=lambda config, v: "qwen_image",
    kohya_module="networks.lora_qwen_image",
    noise="flow",
    scale="channel",
    packed=4,
    compared=(
        *("in_channels", "out_channels", "num_layers", "num_attention_heads"),
        *("attention_head_dim", "joint_attention_dim", "patch_size", "axes_dims_rope"),
    ),
    whole_files=False,
    one_alpha=False,
    # the attention among the layers that Flow-Factory and verl-omni adapt, with both MLPs
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    stated={r"qwenimage.*": "Qwen-Image"},
    unused=last_text,
)
