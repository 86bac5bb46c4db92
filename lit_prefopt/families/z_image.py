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
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
    ),
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
    architecture=lambda config, v: "z-image",
    kohya_version=lambda config, v: "z-image",
    noise="flow",
    scale="shift",
    whole_files=False,
    one_alpha=False,
)
