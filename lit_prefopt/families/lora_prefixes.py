"""Beginnings of the keys of LoRA files, with the part of a model that they belong to."""

from __future__ import annotations

from collections.abc import Iterator

from lit_prefopt.families.base import Component
from lit_prefopt.families.known import FAMILIES

DENOISER = "denoiser"
"""Role of the denoiser in a LoRA; a file does not always state whether it is a UNet."""

TEXT_MODEL = "text_model."
"""Beginning of a text encoder's layers in peft, which is part of their names."""

OTHERS = {
    "lora_transformer_": DENOISER,  # OneTrainer
    "model.diffusion_model.": DENOISER,  # trainers that keep the prefix of whole checkpoints
    "text_encoder_1.": "text_encoder",  # OneTrainer
    TEXT_MODEL: "text_encoder",
}
"""Beginnings that no family states."""


def _components() -> Iterator[tuple[Component, str]]:
    """Yield the components that a LoRA may change, in all families, with their roles."""
    for family in FAMILIES:
        yield family.denoiser, DENOISER
        for part in family.encoders:
            yield part, part.lora_roles[-1]


def _comfyui_prefixes(part: Component) -> Iterator[str]:
    """Yield the beginnings of a component's keys in ComfyUI's files, in full and shortened."""
    start = "text_encoders."
    for prefix in (part.comfyui.removesuffix("transformer."), *part.prefixes):
        if prefix.startswith(start):
            for shown in (prefix, prefix.removeprefix(start)):
                yield from (f"{shown}transformer.", shown)


def _prefixes() -> dict[str, str]:
    """Return the beginnings of keys with the role of their layers, longer ones first."""
    found = dict(OTHERS)
    for part, role in _components():
        found[f"{part.name}."] = DENOISER if role == DENOISER else part.name  # diffusers
        found[f"{part.kohya}_"] = role
        own = (part.comfyui,) if role == DENOISER else _comfyui_prefixes(part)
        found |= dict.fromkeys(own, role)
    return dict(sorted(found.items(), key=lambda one: -len(one[0])))


PREFIXES = _prefixes()
"""Beginnings of keys, with the role of their layers; other keys are a denoiser's."""

COMPONENTS = tuple(dict.fromkeys(part.name for part, _ in _components()))
"""Names of the components that a LoRA may change, in all families."""


def role_of(component: str) -> str:
    """Return the role in a LoRA of a component's name, which a folder or metadata state.

    Args:
        component: The name, such as `unet`.
    """
    return DENOISER if any(component == f.denoiser.name for f in FAMILIES) else component
