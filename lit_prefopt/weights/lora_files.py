"""Read LoRA files in diffusers' or kohya's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_prefopt.errors import InputError, quoted

KOHYA_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""Prefixes of kohya's keys, with the pipeline component that they belong to."""

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name of a LoRA in diffusers."""


class LoRALayer(NamedTuple):
    """The low-rank update of one layer: alpha / rank times `up` times `down`."""

    down: Tensor  # (rank, inputs), of a convolution (rank, inputs, height, width)
    up: Tensor  # (outputs, rank), of a convolution (outputs, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.down)

    @property
    def delta(self) -> Tensor:
        """Update of the layer's weight, (outputs, inputs * height * width) float32."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return product * (self.alpha / self.rank)


class LoRAFile(NamedTuple):
    """A LoRA as read from its file, not yet matched with a model.

    The layers' names are flat (`down_blocks_0_attentions_1_...`), because kohya's layout has no
    dots; `match_lora` maps them to the layers of a model.
    """

    source: str
    layers: dict[tuple[str, str], LoRALayer]  # by part (`unet`, `text_encoder`, ...) and flat name

    def without(self, part: str) -> LoRAFile:
        """Return a copy without the layers of one component."""
        return self._replace(layers={key: x for key, x in self.layers.items() if key[0] != part})


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA from a .safetensors file in diffusers' or kohya's layout.

    Args:
        path: The file, or a folder with `pytorch_lora_weights.safetensors` in it.

    Raises:
        InputError: The file is missing or not a plain LoRA.
    """
    file = Path(path)
    file = file / WEIGHTS if file.is_dir() else file
    tensors, metadata = read_safetensors(file)
    if not any("lora" in key for key in tensors):
        raise InputError(f"{file} contains no LoRA: name a file of LoRA weights.")
    for kind in ("dora_scale", "lora_magnitude_vector", "lora_mid"):
        if any(kind in key for key in tensors):
            raise InputError(
                f"{file} contains `{kind}`, which is not a plain LoRA: merge it into its model "
                "with the program that wrote it, and use the merged model instead."
            )
    kohya = any(key.startswith(tuple(KOHYA_PARTS)) for key in tensors)
    layers = _kohya_layers(file, tensors) if kohya else _diffusers_layers(file, tensors, metadata)
    return LoRAFile(str(path), layers)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a .safetensors file."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; name a .safetensors file.")
    try:
        with safe_open(file, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a safetensors file: convert the weights to that format; pickled files "
            "(.ckpt, .pt, .bin of others) are never opened."
        ) from error


def flat_name(name: str) -> str:
    """Return a module's name in kohya's layout."""
    return name.replace(".", "_")


def _kohya_layers(file: Path, tensors: dict[str, Tensor]) -> dict[tuple[str, str], LoRALayer]:
    """Parse the layers of `lora_unet_NAME.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in KOHYA_PARTS if key.startswith(p)), None)
        name, _, half = key.partition(".")
        if prefix is None:
            raise InputError(f"{file} contains {quoted(key)}, which is not in kohya's layout.")
        halves.setdefault((KOHYA_PARTS[prefix], name.removeprefix(prefix)), {})[half] = tensor
    layers = {}
    for (part, name), found in halves.items():
        alpha = found.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise InputError(
                f"{file} is damaged: the alpha of its layer {quoted(name)} is not a number."
            )
        down, up = _pair(file, name, found, "lora_down.weight", "lora_up.weight")
        layers[part, name] = LoRALayer(down, up, len(down) if alpha is None else float(alpha))
    return layers


def _diffusers_layers(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[tuple[str, str], LoRALayer]:
    """Return the layers of `unet.NAME.lora.down.weight`, `unet.NAME.lora_A.weight` and older."""
    if any(key.startswith("base_model.") for key in tensors):
        raise InputError(
            f"{file} is a peft adapter, whose alpha is in another file: load it with peft and "
            "save it with diffusers' `save_lora_weights`."
        )
    adapters = _adapter_metadata(file, metadata)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part = next((p for p in set(KOHYA_PARTS.values()) if key.startswith(f"{p}.")), "unet")
        parts.setdefault(part, {})[key.removeprefix(f"{part}.")] = tensor
    layers = {}
    for part, state in parts.items():
        halves: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _peft_names(file, part, state).items():
            name, _, half = key.rpartition(".lora_")
            halves.setdefault(name, {})[half] = tensor
        config = {k.removeprefix(f"{part}."): v for k, v in adapters.items() if k.startswith(part)}
        for name, found in halves.items():
            down, up = _pair(file, name, found, "A.weight", "B.weight")
            alpha = _alpha(config, name, len(down))
            layers[part, flat_name(name)] = LoRALayer(down, up, alpha)
    return layers


def _adapter_metadata(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return the adapter configurations in the file's metadata."""
    try:
        return dict(json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: its adapter metadata cannot be read.") from error


def _peft_names(file: Path, part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one part's tensors under `NAME.lora_A.weight` and `NAME.lora_B.weight`."""
    if all(".lora_A." in key or ".lora_B." in key for key in state):
        return state
    try:
        if part == "unet":
            return convert_unet_state_dict_to_peft(state)
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    except ValueError as error:
        raise InputError(f"{file} is not in diffusers' or kohya's LoRA layout.") from error


def _alpha(config: dict[str, Any], name: str, rank: int) -> float:
    """Return a layer's alpha from the adapter metadata; by default its rank."""
    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, name), config.get("lora_alpha", rank)))
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _pair(
    file: Path, name: str, found: dict[str, Tensor], down: str, up: str
) -> tuple[Tensor, Tensor]:
    """Return the two matrices of a layer; raise InputError for any other tensors of its name."""
    if set(found) != {down, up}:
        raise InputError(
            f"{file} contains {', '.join(sorted(found))} for its layer {quoted(name)} instead of "
            f"{down} and {up}: use a plain LoRA that is not damaged."
        )
    shapes = found[down].shape, found[up].shape
    if min(map(len, shapes)) < 2 or shapes[0][0] != shapes[1][1] or shapes[0][0] == 0:
        raise InputError(
            f"{file} is damaged: the two matrices of its layer {quoted(name)} do not fit."
        )
    return found[down], found[up]
