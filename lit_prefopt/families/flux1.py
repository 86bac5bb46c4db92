"""FLUX.1: a transformer of double and single blocks, CLIP and T5."""

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
        layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=VAE,
    encoders=(
        Component(
            "text_encoder",
            "CLIPTextModel",
            ("text_encoders.clip_l.", "text_encoder.", ""),
            layouts,
            package="transformers",
            kohya="lora_te1",
        ),
        Component(
            "text_encoder_2",
            "T5EncoderModel",
            ("text_encoders.t5xxl.", "text_encoder_2.", ""),
            layouts,
            package="transformers",
            kohya="lora_te3",
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
