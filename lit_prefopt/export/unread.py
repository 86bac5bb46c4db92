"""Report which layers of an exported LoRA diffusers' `load_lora_weights` does not read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.layouts import Layout
from lit_prefopt.weights.checks import some_names

DIFFUSERS = "diffusers 0.42"
"""The version for which families state what it does not read."""


def lora_parts(base: BasePipeline) -> set[str]:
    """Return the networks of which diffusers loads a LoRA: of text encoders, CLIP alone.

    Args:
        base: A pipeline.
    """
    end = "_lora_layers"
    arguments = inspect.signature(base.kind.save_lora_weights).parameters
    names = {name.removesuffix(end) for name in arguments if name.endswith(end)}
    parts = base.family.components
    clip = {name for name in names & {*parts} if parts[name].class_name.startswith("CLIP")}
    return clip | (names & {base.family.denoiser.name})


def unread_layers(
    layers: Iterable[tuple[str, str]], to: Layout, base: BasePipeline
) -> list[tuple[str, str]]:
    """Return the layers that diffusers does not read of a LoRA file, by its family's table.

    Args:
        layers: All layers of the file, by part and module.
        to: Layout of the file.
        base: The pipeline that they belong to.
    """
    layers, family = list(layers), base.family
    own, loaded = family.denoiser.name, lora_parts(base)
    starts = family.unread.get(to, ())
    if to != "diffusers-lora" and any(
        part == own and name.startswith(family.refused) for part, name in layers
    ):
        return layers

    def unread(part: str, name: str) -> bool:
        if "" in starts or part not in loaded:
            return True
        return part == own and any(name == s or name.startswith(f"{s}.") for s in starts)

    return [layer for layer in layers if unread(*layer)]


def describe_unread(
    layers: Iterable[tuple[str, str]], to: Layout, base: BasePipeline
) -> str | None:
    """Return a sentence about the layers that diffusers does not read, or None.

    Args:
        layers: All layers of the file, by part and module.
        to: Layout of the file.
        base: The pipeline that they belong to.
    """
    layers = list(layers)
    missing = unread_layers(layers, to, base)
    if not missing:
        return None
    other = "diffusers-lora" if {part for part, _ in missing} <= lora_parts(base) else "pipeline"
    if len(missing) == len(layers):
        return (
            f"{DIFFUSERS} reads none of the {len(layers)} layers of this file: export to {other} "
            "for it."
        )
    names = some_names(".".join(layer) for layer in missing)
    return (
        f"{DIFFUSERS} leaves out {len(missing)} of the {len(layers)} layers of this file ({names}) "
        f"when it loads it: export to {other} for it."
    )
