"""Keys of LoRA files: component, layer and matrix of each, and the configurations of alphas."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.families.lora_prefixes import (
    COMPONENTS,
    DENOISER,
    PREFIXES,
    TEXT_MODEL,
    role_of,
)
from lit_prefopt.weights.checks import some_names

PEFT = "base_model.model."
"""Prefix of peft's keys, before that of a component."""

KEY = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<alpha>alpha)|lora_(?P<half>down|up|A|B)(?:\.\w+)?\.weight)"
)
"""A key of all layouts but diffusers' older ones."""

OLD_KEY = re.compile(r".+(?:\.lora|_lora|\.lora_linear_layer)\.(?:down|up)\.weight")
"""A key of diffusers' older layouts."""

HALVES = {"A": "down", "B": "up"}
"""Names of the two matrices in peft, and in all other layouts."""

OTHER_STARTS = ("pissa", "olora", "loftq", "corda")
"""Initialisations of peft that change the base's weights."""

Adapter = dict[str, Any]
"""Configuration of an adapter in the words of peft."""


def layer_tensors(
    file: Path, tensors: dict[str, Tensor], part: str | None
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return the tensors `down`, `up` and `alpha` of all layers, by role and layer name.

    Args:
        file: The file that they come from, for messages.
        tensors: All tensors of a LoRA file.
        part: The role, if the keys do not state it.

    Raises:
        InputError: A key is in no known layout, two keys name the same matrix, or keys of the
            denoiser are in two layouts.
    """
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    first: dict[str, str] = {}  # a key of the denoiser by the beginning
    for key, tensor in _new_names(file, tensors).items():
        found = KEY.fullmatch(key.removeprefix(PEFT))
        if found is None:
            raise InputError(
                f"{file} contains {some_names([key])}, which is in no layout of a plain LoRA: use "
                "one of diffusers, kohya, peft, ComfyUI or OneTrainer."
            )
        prefix = next((p for p in PREFIXES if found["layer"].startswith(p)), "")
        named = prefix if prefix != TEXT_MODEL else ""  # part of the layer's name
        owner = part or PREFIXES.get(prefix, DENOISER)
        if owner == DENOISER:
            first.setdefault(prefix, key)
        if len(first) > 1:
            raise mixed_layouts(file, *first.values())
        layer = found["layer"].removeprefix(named).replace(".processor.", ".")
        half = found["alpha"] or HALVES.get(found["half"], found["half"])
        held = layers.setdefault((owner, layer.removesuffix("_lora")), {})
        if half in held:
            raise InputError(f"{file} contains {some_names([key])} twice; remove one of them.")
        held[half] = tensor
    return layers


def mixed_layouts(source: object, first: str, second: str) -> InputError:
    """Return the error for a LoRA whose names are of two layouts.

    Args:
        source: The file.
        first: A key or a layer's name in one of them.
        second: One in the other.
    """
    return InputError(
        f"{source} mixes the names of two layouts, such as {some_names([first])} and "
        f"{some_names([second])}: use a LoRA that is written in one of them."
    )


def file_adapters(file: Path, metadata: dict[str, str]) -> dict[str, Adapter]:
    """Return the adapter configurations in a file's metadata, by role.

    Args:
        file: The file, for messages.
        metadata: Its metadata, as diffusers writes them.
    """
    try:
        stated = dict(json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: its adapter metadata cannot be read.") from error
    adapters: dict[str, Adapter] = {}
    for key, value in stated.items():
        owner, _, name = key.partition(".")
        adapters.setdefault(role_of(owner), {})[name] = value
    for adapter in adapters.values():
        _check_plain(file, {"peft_type": "LORA"} | adapter)
    return adapters


def peft_adapter(file: Path) -> Adapter:
    """Read the configuration of a peft adapter.

    Args:
        file: Its adapter_config.json.

    Raises:
        InputError: It is not readable, or not that of a plain LoRA on unchanged weights.
    """
    try:
        adapter: Adapter = dict(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{file} is damaged: it cannot be read as JSON.") from error
    _check_plain(file, adapter)
    return adapter


def _check_plain(file: Path, adapter: Adapter) -> None:
    """Check that a configuration is that of a plain LoRA on unchanged weights."""
    kind, start = adapter.get("peft_type"), str(adapter.get("init_lora_weights")).lower()
    if kind != "LORA" or adapter.get("use_dora"):
        kind = "DoRA" if adapter.get("use_dora") else some_names([str(kind)])
        raise InputError(
            f"{file} is of a {kind}, which is not a plain LoRA: merge it into its model with peft, "
            "and use the merged model instead."
        )
    if start.startswith(OTHER_STARTS):
        raise InputError(
            f"{file} was initialised by {some_names([start])}, which changes the weights of the "
            "model: merge it with peft, and use the merged model instead."
        )


def adapter_alpha(file: Path, adapter: Adapter, layer: str, rank: int) -> float:
    """Return a layer's alpha by an adapter's configuration; by default its rank.

    Args:
        file: The LoRA's file, for messages.
        adapter: The configuration, or an empty one.
        layer: Name of the layer.
        rank: Its rank.

    Raises:
        InputError: The alpha is not a finite number.
    """
    try:
        patterns = dict(adapter.get("alpha_pattern") or {})
        stated: Any = patterns.get(get_pattern_key(patterns, layer), adapter.get("lora_alpha"))
        alpha = float(rank if stated is None else stated)
    except (ValueError, TypeError, re.error) as error:
        raise InputError(f"{file} is damaged: its configuration of alphas is not one.") from error
    if not math.isfinite(alpha):
        raise InputError(f"{file} is damaged: the alpha of {some_names([layer])} is {alpha}.")
    return alpha * rank**0.5 if adapter.get("use_rslora") else alpha


def _new_names(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with diffusers' older keys replaced by peft's."""
    old: dict[str, dict[str, Tensor]] = {}
    for key in filter(OLD_KEY.fullmatch, tensors):
        owner = next((p for p in COMPONENTS if key.startswith(f"{p}.")), "")
        old.setdefault(owner, {})[key.removeprefix(f"{owner}.") if owner else key] = tensors[key]
    names = {key: tensor for key, tensor in tensors.items() if not OLD_KEY.fullmatch(key)}
    for owner, state in old.items():
        try:
            if owner.startswith("text"):
                state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
            else:
                state = convert_unet_state_dict_to_peft(state)
        except ValueError as error:
            raise InputError(f"{file} is not in diffusers' or kohya's LoRA layout.") from error
        names |= {f"{owner}.{key}" if owner else key: tensor for key, tensor in state.items()}
    return names
