"""Z-Image: a transformer of one stream, and a language model, Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Component, Family, Layout
from lit_prefopt.families.ldm_layouts import as_is
from lit_prefopt.families.stable_diffusion import VAE


def layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of a network that files store under its own names.

    Args:
        parameters: Names of all parameters.
    """
    yield as_is(parameters)


Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    denoiser=Component(
        "transformer",
        "ZImageTransformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=VAE,
    encoders=(
        Component(
            "text_encoder",
            "Qwen3Model",
            ("text_encoders.qwen3.", "text_encoder.", ""),
            layouts,
            package="transformers",
            kohya="lora_te",
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
    whole_files=False,
    one_alpha=False,
    lora_targets=(  # of Flow-Factory's Z-Image: all layers of attention and feed-forward
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
)
