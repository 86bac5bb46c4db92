"""Match LoRA layers with a model's, and merge them into its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.weights.ldm_names import unet_names
from lit_prefopt.weights.lora_files import LoRAFile, LoRALayer, flat_name

Part = str
Parts = Mapping[Part, nn.Module]


def merge_lora(unet: nn.Module, text_encoders: Sequence[nn.Module], lora: LoRAFile) -> None:
    """Merge a LoRA into the weights of a UNet and of its text encoders, in place.

    The sum is computed in float32 and cast to the weights' dtype.

    Args:
        unet: The UNet that the LoRA was trained on, or one of its family.
        text_encoders: The pipeline's text encoders, in its order; empty for the UNet alone.
        lora: A LoRA from `read_lora`.

    Raises:
        InputError: The LoRA has a layer that these networks do not have.
    """
    parts = pipeline_parts(unet, text_encoders)
    for (part, name), layer in match_lora(parts, lora).items():
        weight = parts[part].get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            delta = layer.delta.to(weight.device).reshape(weight.shape)
            weight.copy_(weight.float() + delta)


def pipeline_parts(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[Part, nn.Module]:
    """Return the components that a LoRA may change, by their names in a pipeline."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return dict(zip(names, (unet, *text_encoders), strict=False))


def match_lora(parts: Parts, lora: LoRAFile) -> dict[tuple[Part, str], LoRALayer]:
    """Map a LoRA's layers to the modules of a model, by component and module name.

    Args:
        parts: The networks (possibly on the meta device) by their names in a pipeline.
        lora: A LoRA from `read_lora`.

    Raises:
        InputError: A layer is unknown, of another shape, or a duplicate.
    """
    known = {part: _spellings(part, net) for part, net in parts.items()}
    if missing := {part for part, _ in lora.layers} - set(known):
        raise InputError(
            f"{lora.source} also changes the {' and the '.join(sorted(missing))}, which "
            "this output does not contain: export a complete pipeline, or use a LoRA of the "
            f"{' and '.join(known)} alone."
        )
    strange = [key for key in lora.layers if key[1] not in known[key[0]]]
    if strange:
        part, name = strange[0]
        raise InputError(
            f"{lora.source} is a LoRA of another model family: {len(strange)} of its "
            f"{len(lora.layers)} layers are not in this model, such as {quoted(name)} of its "
            f"{part}; name the base that it was trained on."
        )
    matched: dict[tuple[Part, str], LoRALayer] = {}
    for (part, flat), layer in lora.layers.items():
        name = known[part][flat]
        if (part, name) in matched:
            raise InputError(f"{lora.source} contains {quoted(name)} twice; remove one of them.")
        _check_shape(lora.source, name, parts[part].get_submodule(name), layer)
        matched[part, name] = layer
    return matched


def _spellings(part: Part, net: nn.Module) -> dict[str, str]:
    """Map all flat names in use to the layers that can have an adapter."""
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if part == "unet":
        original = unet_names(names)
        return {flat_name(spelt): n for n in names for spelt in (n, original[n])}
    # transformers has dropped `text_model.` from the names of one of its two CLIP text encoders
    short = {name: name.removeprefix("text_model.") for name in names}
    return {flat_name(f"{p}{short[n]}"): n for n in names for p in ("", "text_model.")}


def _check_shape(source: str, name: str, module: nn.Module, layer: LoRALayer) -> None:
    weight = module.get_parameter("weight")
    outputs, inputs = len(weight), weight[0].numel()
    if (len(layer.up), layer.down[0].numel()) != (outputs, inputs):
        raise InputError(
            f"{source} is a LoRA of another model family: it maps {layer.down[0].numel()} values "
            f"to {len(layer.up)}, while {quoted(name)} of this model maps {inputs} to {outputs}; "
            "name the base that it was trained on."
        )
