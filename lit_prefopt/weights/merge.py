"""Match LoRA layers with a model's, and merge them into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.families.base import Family
from lit_prefopt.families.known import other_model
from lit_prefopt.families.lora_prefixes import DENOISER
from lit_prefopt.weights.checks import some_names
from lit_prefopt.weights.lora_files import LoRAFile, LoRALayer, flat_name
from lit_prefopt.weights.lora_keys import mixed_layouts
from lit_prefopt.weights.lora_layers import (
    Place,
    adaptable,
    denoiser_spellings,
    layout_names,
    original_layers,
    split_layer,
)

Part = str
Parts = Mapping[Part, nn.Module]
Spellings = dict[str, dict[str, Place | None]]


def merge_lora(
    family: Family, denoiser: nn.Module, encoders: Mapping[str, nn.Module], lora: LoRAFile
) -> None:
    """Merge a LoRA into the weights of a denoiser and of its text encoders, in place.

    The sum is computed in float32 and cast to the weights' dtype.

    Args:
        family: Family of the networks.
        denoiser: The UNet or transformer that the LoRA was trained on, or one of its family.
        encoders: The pipeline's text encoders by name; empty for the denoiser alone.
        lora: A LoRA from `read_lora`.

    Raises:
        InputError: The LoRA has a layer that these networks do not have.
    """
    parts = {family.denoiser.name: denoiser, **encoders}
    for (part, name), layer in match_lora(family, parts, lora).items():
        weight = parts[part].get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            delta = layer.delta.to(weight.device).reshape(weight.shape)
            weight.copy_(weight.float() + delta)


def match_lora(family: Family, parts: Parts, lora: LoRAFile) -> dict[tuple[Part, str], LoRALayer]:
    """Map a LoRA's layers to the modules of a model, by component and module name.

    A layer of the original code that diffusers has as several is split.

    Args:
        family: Family of the networks.
        parts: The networks (possibly on the meta device) by their names in a pipeline.
        lora: A LoRA from `read_lora`.

    Raises:
        InputError: A layer is unknown, of another shape, or a duplicate, or layers are named in
            two layouts.
    """
    owners = {role: c.name for c in family.encoders for role in c.lora_roles if c.name in parts}
    own = owners[DENOISER] = family.denoiser.name
    if missing := {role for role, _ in lora.layers} - set(owners):
        raise _missing_part(lora.source, family, sorted(missing), parts)
    used = {owners[role] for role, _ in lora.layers}
    places = original_layers(parts[own], family.denoiser) if own in used else {}
    known = {
        part: denoiser_spellings(places) if part == own else _encoder_spellings(parts[part])
        for part in used
    }
    strange = [key for key in lora.layers if key[1] not in known[owners[key[0]]]]
    if strange:
        role, name = strange[0]
        raise InputError(
            f"{_other_family(lora)}: {len(strange)} of its "
            f"{len(lora.layers)} layers are not in this model, such as {quoted(name)} of its "
            f"{owners[role]}; name the base that it was trained on."
        )
    _check_one_layout(lora, places)
    matched: dict[tuple[Part, str], LoRALayer] = {}
    for (role, flat), layer in lora.layers.items():
        part = owners[role]
        targets = known[part][flat]
        for name, place in targets.items():
            if (part, name) in matched:
                raise InputError(
                    f"{lora.source} contains {quoted(name)} twice; remove one of them."
                )
            _check_shape(lora, name, parts[part].get_submodule(name), layer, place)
            if (split := split_layer(layer, place)) is not None:
                matched[part, name] = split
    if own in used:
        _warn_of_another_model(lora, family, parts[own])
    return matched


def _missing_part(source: str, family: Family, missing: list[str], parts: Parts) -> InputError:
    """Return the error for a LoRA of text encoders that are not loaded."""
    names = " and the ".join(missing)
    alone = f"use a LoRA of the {' and '.join(parts)} alone"
    known = {role for part in family.encoders for role in part.lora_roles}
    if not known.issuperset(missing):
        return InputError(
            f"{source} also changes the {names}, which a model of {family.title} does not have: "
            f"{alone}."
        )
    return InputError(
        f"{source} also changes the {names}, which this output does not contain or this run does "
        "not load: export a complete pipeline, load its encoders (`--backbone.encoders true`), or "
        f"{alone}."
    )


def _other_family(lora: LoRAFile) -> str:
    """Return the beginning of the messages of LoRAs that do not fit, with what metadata state."""
    stated = f" ({some_names(lora.models, 1)} by its metadata)" if lora.models else ""
    return f"{lora.source} is a LoRA of another model family{stated}"


def _warn_of_another_model(lora: LoRAFile, family: Family, denoiser: nn.Module) -> None:
    """Warn of a LoRA that fits, and was trained on another model by its metadata."""
    config: Any = denoiser.config
    if (other := other_model(lora.models, family, config)) is not None:
        rank_zero_warn(
            f"{lora.source} is a LoRA of {other} by its metadata ({some_names(lora.models)}), and "
            f"this model is {family.model_title(config) or f'of {family.title}'}: its layers fit "
            "and are used, but what they do here is not what they were trained for; name the base "
            "that it was trained on."
        )


def _check_one_layout(lora: LoRAFile, places: Mapping[str, Place]) -> None:
    """Check that the names of a denoiser's layers are all original ones or all diffusers'."""
    flat = [name for role, name in lora.layers if role == DENOISER]
    found = [[name for name in flat if name in names] for names in layout_names(places)]
    if all(found):
        raise mixed_layouts(lora.source, *(names[0] for names in found))


def _encoder_spellings(net: nn.Module) -> Spellings:
    """Map all flat names in use to the layers of a text encoder that can have an adapter."""
    # transformers has dropped `text_model.` from the names of one of its two CLIP text encoders
    return {
        flat_name(f"{start}{name.removeprefix('text_model.')}"): {name: None}
        for name in adaptable(net)
        for start in ("", "text_model.")
    }


def _check_shape(
    lora: LoRAFile, name: str, module: nn.Module, layer: LoRALayer, place: Place | None
) -> None:
    weight = module.get_parameter("weight")
    outputs, inputs = len(weight), weight[0].numel()
    if place is not None and place.sizes:
        outputs = sum(place.sizes)
    given = layer.down.shape[1:]
    kernel = layer.down.ndim > 2 and [n for n in given if n > 1] != [
        n for n in weight.shape[1:] if n > 1
    ]
    if kernel and given.numel() == inputs:
        raise InputError(
            f"{lora.source} has {quoted(name)} as a layer of {tuple(given)} inputs, which are "
            f"{tuple(weight.shape[1:])} in this model: use a LoRA that is not transposed."
        )
    if (len(layer.up), layer.down[0].numel()) != (outputs, inputs):
        raise InputError(
            f"{_other_family(lora)}: it maps {layer.down[0].numel()} values "
            f"to {len(layer.up)}, while {quoted(name)} of this model maps {inputs} to {outputs}; "
            "name the base that it was trained on."
        )
