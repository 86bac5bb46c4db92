"""Match LoRA layers with a model's, and merge them into its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.lora_prefixes import DENOISER, role_of
from lit_prefopt.weights.lora_files import LoRAFile, LoRALayer, flat_name
from lit_prefopt.weights.lora_keys import mixed_layouts
from lit_prefopt.weights.lora_layers import (
    Place,
    adaptable,
    denoiser_spellings,
    layout_names,
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
    owners[DENOISER] = family.denoiser.name
    if missing := {role for role, _ in lora.layers} - set(owners):
        raise InputError(
            f"{lora.source} also changes the {' and the '.join(sorted(missing))}, which "
            "this output does not contain: export a complete pipeline, or use a LoRA of the "
            f"{' and '.join(parts)} alone."
        )
    used = {owners[role] for role, _ in lora.layers}
    known = {part: _spellings(family.components[part], parts[part]) for part in used}
    strange = [key for key in lora.layers if key[1] not in known[owners[key[0]]]]
    if strange:
        role, name = strange[0]
        raise InputError(
            f"{lora.source} is a LoRA of another model family: {len(strange)} of its "
            f"{len(lora.layers)} layers are not in this model, such as {quoted(name)} of its "
            f"{owners[role]}; name the base that it was trained on."
        )
    if family.denoiser.name in used:
        _check_one_layout(lora, family.denoiser, parts[family.denoiser.name])
    matched: dict[tuple[Part, str], LoRALayer] = {}
    for (role, flat), layer in lora.layers.items():
        part = owners[role]
        targets = known[part][flat]
        for name, place in targets.items():
            if (part, name) in matched:
                raise InputError(
                    f"{lora.source} contains {quoted(name)} twice; remove one of them."
                )
            _check_shape(lora.source, name, parts[part].get_submodule(name), layer, place)
            if (own := split_layer(layer, place)) is not None:
                matched[part, name] = own
    return matched


def _check_one_layout(lora: LoRAFile, component: Component, net: nn.Module) -> None:
    """Check that the names of a denoiser's layers are all original ones or all diffusers'."""
    flat = [name for role, name in lora.layers if role == DENOISER]
    found = [[name for name in flat if name in names] for names in layout_names(net, component)]
    if all(found):
        raise mixed_layouts(lora.source, *(names[0] for names in found))


def _spellings(component: Component, net: nn.Module) -> Spellings:
    """Map all flat names in use to the layers that can have an adapter."""
    if role_of(component.name) == DENOISER:
        return denoiser_spellings(net, component)
    # transformers has dropped `text_model.` from the names of one of its two CLIP text encoders
    return {
        flat_name(f"{start}{name.removeprefix('text_model.')}"): {name: None}
        for name in adaptable(net)
        for start in ("", "text_model.")
    }


def _check_shape(
    source: str, name: str, module: nn.Module, layer: LoRALayer, place: Place | None
) -> None:
    weight = module.get_parameter("weight")
    outputs, inputs = len(weight), weight[0].numel()
    if place is not None and place.sizes:
        outputs = sum(place.sizes)
    if (len(layer.up), layer.down[0].numel()) != (outputs, inputs):
        raise InputError(
            f"{source} is a LoRA of another model family: it maps {layer.down[0].numel()} values "
            f"to {len(layer.up)}, while {quoted(name)} of this model maps {inputs} to {outputs}; "
            "name the base that it was trained on."
        )
