"""Beginnings of the keys of LoRA files, with the part of a model that they belong to."""

from __future__ import annotations

from lit_prefopt.families.known import FAMILIES

DENOISER = "denoiser"
"""Role of the denoiser in a LoRA; a file does not always state whether it is a UNet."""

TEXT_MODEL = "text_model."
"""Beginning of a text encoder's layers in peft, which is part of their names."""

PREFIXES = {
    # kohya and OneTrainer, whose layer names have no dots
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    # diffusers and OneTrainer
    **{f"{family.denoiser.name}.": DENOISER for family in FAMILIES},
    "text_encoder.": "text_encoder",
    "text_encoder_1.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    # ComfyUI, and trainers that write for it
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    **{
        f"{start}{name}.{end}": role
        for start in ("text_encoders.", "")
        for end in ("transformer.", "")
        for name, role in {
            "clip_l": "text_encoder",
            "clip_h": "text_encoder",
            "clip_g": "text_encoder_2",
            "t5xxl": "text_encoder_3",
            "qwen3_4b": "text_encoder",
            "qwen3_8b": "text_encoder",
            "qwen25_7b": "text_encoder",
            "gemma2_2b": "text_encoder",
        }.items()
    },
    # peft
    TEXT_MODEL: "text_encoder",
}
"""Beginnings of keys, with the role of their layers; other keys are a denoiser's."""

COMPONENTS = tuple(
    dict.fromkeys(part.name for family in FAMILIES for part in (family.denoiser, *family.encoders))
)
"""Names of the components that a LoRA may change, in all families."""


def role_of(component: str) -> str:
    """Return the role in a LoRA of a component's name, which a folder or metadata state.

    Args:
        component: The name, such as `unet`.
    """
    return DENOISER if any(component == f.denoiser.name for f in FAMILIES) else component
