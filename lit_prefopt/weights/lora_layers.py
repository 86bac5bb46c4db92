"""Names of LoRA layers in the original code, with fused query, key and value split and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_prefopt.families.base import Component, Entry
from lit_prefopt.weights.component_files import fused_sizes
from lit_prefopt.weights.lora_files import LoRALayer, flat_name


def adaptable(net: nn.Module) -> list[str]:
    """Return the names of the layers of a network that can have an adapter."""
    return [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


class Place(NamedTuple):
    """Where the original code has a layer.

    Args:
        entry: The original layer, and the layer's place in it.
        sizes: Outputs of all pieces of the original layer, if it is a fused one.
    """

    entry: Entry
    sizes: Sequence[int] = ()


def original_layers(net: nn.Module, component: Component) -> dict[str, Place]:
    """Return where the original code has the layers of a denoiser.

    Args:
        net: The denoiser.
        component: The component of its family.
    """
    layout = component.original(list(net.state_dict()))
    entries = {
        name: layout[f"{name}.weight"]._replace(
            key=layout[f"{name}.weight"].key.removesuffix(".weight")
        )
        for name in adaptable(net)
    }
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in entries}
    sizes = fused_sizes(entries, weights)
    return {name: Place(entry, sizes.get(entry.key, ())) for name, entry in entries.items()}


def denoiser_spellings(places: Mapping[str, Place]) -> dict[str, dict[str, Place | None]]:
    """Map all flat names in use to the layers that they stand for.

    A layer's value is None where the name is that of the layer alone, and else its place in the
    layer of the original code.

    Args:
        places: Where the original code has the denoiser's layers, from `original_layers`.
    """
    found: dict[str, dict[str, Place | None]] = {}
    for name, place in places.items():
        key, piece = place.entry.key, place.entry.piece
        found.setdefault(flat_name(key), {})[name] = place
        if piece is not None:  # each piece by itself, as OneTrainer names it
            found.setdefault(flat_name(f"{key}.{piece}"), {})[name] = None
    for name in places:
        found[flat_name(name)] = {name: None}
    return found


def layout_names(places: Mapping[str, Place]) -> tuple[set[str], set[str]]:
    """Return the flat names that only the original code has, and those that only diffusers has.

    Args:
        places: Where the original code has the denoiser's layers, from `original_layers`.
    """
    own = {flat_name(name) for name in places}
    original: set[str] = set()
    for place in places.values():
        key, piece = place.entry.key, place.entry.piece
        original.add(flat_name(key))
        if piece is not None:
            original.add(flat_name(f"{key}.{piece}"))
    return original - own, own - original


def split_layer(layer: LoRALayer, place: Place | None) -> LoRALayer | None:
    """Return the part of an original layer's LoRA that belongs to one of diffusers' layers.

    Of a piece, the ranks that do not reach it are left out, as those of the other pieces in a LoRA
    that `to_original` joined; None if no rank does.

    Args:
        layer: The LoRA of the original layer.
        place: Place of diffusers' layer in it.
    """
    if place is None:
        return layer
    if place.entry.piece is None:
        return layer._replace(up=_swapped(layer.up, place.entry))
    up = layer.up.split(list(place.sizes))[place.entry.piece]
    reached = up.any(dim=0)
    if not layer.up.any() or reached.all():  # a LoRA before its first step is zero everywhere
        return layer._replace(down=layer.down.clone(), up=up)
    rank = int(reached.sum())
    alpha = layer.alpha * rank / layer.rank
    return LoRALayer(layer.down[reached], up[:, reached], alpha) if rank else None


def to_original(
    layers: Mapping[str, LoRALayer], net: nn.Module, component: Component
) -> dict[str, LoRALayer]:
    """Return the LoRA of the original code's layers that is equal to one of diffusers' layers.

    The LoRAs of the pieces of a fused layer, such as a query, a key and a value, become one of that
    layer, whose rank is the sum of theirs; one that had been split is joined again.

    Args:
        layers: LoRA by names of layers in diffusers.
        net: The denoiser that they belong to, possibly on the meta device.
        component: The component of its family.
    """
    places = original_layers(net, component)
    out: dict[str, LoRALayer] = {}
    fused: dict[str, dict[int, LoRALayer]] = {}
    for name, layer in layers.items():
        entry = places[name].entry
        if entry.piece is not None:
            fused.setdefault(entry.key, {})[entry.piece] = layer
        else:
            out[entry.key] = layer._replace(up=_swapped(layer.up, entry))
    sizes = {place.entry.key: place.sizes for place in places.values()}
    return out | {key: _joined(parts, sizes[key]) for key, parts in fused.items()}


def _joined(parts: dict[int, LoRALayer], sizes: Sequence[int]) -> LoRALayer:
    """Return the LoRA of a fused layer, given those of its pieces and the outputs of each."""
    first = next(iter(parts.values()))
    dtype = reduce(torch.promote_types, (layer.up.dtype for layer in parts.values()))
    alike = all(
        (x.alpha, x.down.dtype) == (first.alpha, first.down.dtype)
        and torch.equal(x.down, first.down)
        for x in parts.values()
    )
    if alike and len(parts) == len(sizes):  # split from one
        return first._replace(up=torch.cat([parts[piece].up for piece in sorted(parts)]))
    scales = [layer.alpha / layer.rank for layer in parts.values()]
    rank = sum(layer.rank for layer in parts.values())
    same = len(set(scales)) == 1
    up = torch.zeros(sum(sizes), rank, dtype=dtype if same else torch.float32)
    column = 0
    for piece, layer in sorted(parts.items()):
        start = sum(sizes[:piece])
        block = layer.up if same else layer.up.float() * (layer.alpha / layer.rank)
        up[start : start + sizes[piece], column : column + layer.rank] = block
        column += layer.rank
    down = torch.cat([layer.down for _, layer in sorted(parts.items())])
    return LoRALayer(down, up, scales[0] * rank if same else float(rank))


def _swapped(up: Tensor, entry: Entry) -> Tensor:
    """Return outputs with scale and shift exchanged, if the original code has them so."""
    return torch.cat(up.chunk(2)[::-1]) if entry.swapped else up
