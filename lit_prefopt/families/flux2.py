"""FLUX.2 klein: a transformer of double and single blocks, and a language model, Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Component, Family, Layout
from lit_prefopt.families.ldm_layouts import as_is


def layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of a network that files store under its own names.

    Args:
        parameters: Names of all parameters.
    """
    yield as_is(parameters)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2 klein",
    pipelines=("Flux2KleinPipeline",),
    denoiser=Component(
        "transformer",
        "Flux2Transformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=Component("vae", "AutoencoderKLFlux2", ("vae.", "first_stage_model.", ""), layouts),
    encoders=(
        Component(
            "text_encoder",
            "Qwen3ForCausalLM",
            ("text_encoders.qwen3.", "text_encoder.", ""),
            layouts,
            package="transformers",
            kohya="lora_te",
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
