"""Write LoRA files in the layouts of diffusers, kohya and ComfyUI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.metadata import base_version, modelspec
from lit_prefopt.export.unread import lora_parts
from lit_prefopt.processes.marks import add_metadata
from lit_prefopt.weights.lora_files import LoRALayer, flat_name
from lit_prefopt.weights.lora_layers import to_original

Layers = Mapping[tuple[str, str], LoRALayer]


def combine(first: Layers, second: Layers) -> dict[tuple[str, str], LoRALayer]:
    """Combine two LoRAs into one that is exactly equal to their sum.

    The two updates of a layer are concatenated, so that its rank is the sum of theirs, and their
    alphas are folded into the weights.

    Args:
        first: Layers by part and module, as `match_lora` returns them.
        second: Those of another LoRA for the same base.
    """
    return {
        key: _side_by_side([lora[key] for lora in (first, second) if key in lora])
        for key in {**first, **second}
    }


def _side_by_side(layers: list[LoRALayer]) -> LoRALayer:
    if len(layers) == 1:
        return layers[0]
    down = torch.cat([layer.down.float() for layer in layers])
    up = torch.cat([layer.up.float() * (layer.alpha / layer.rank) for layer in layers], dim=1)
    return LoRALayer(down, up, len(down))


def write_diffusers_lora(
    layers: Layers, path: Path, base: BasePipeline, dtype: torch.dtype
) -> None:
    """Write a LoRA for `load_lora_weights`, with ranks and alphas in its metadata.

    Args:
        layers: Layers by part and module.
        path: The file.
        base: The pipeline that they belong to.
        dtype: Precision of the file.
    """
    arguments: dict[str, object] = {}
    known = lora_parts(base)
    for part in dict.fromkeys(part for part, _ in layers):
        if part not in known:
            raise InputError(
                f"diffusers loads no LoRA of the {part} of a {base.kind.__name__}: export it to "
                "kohya or comfyui, or merged to pipeline."
            )
        own = {name: layer for (owner, name), layer in layers.items() if owner == part}
        # peft's keys: a file that mixes them with diffusers' older ones is only half loaded
        arguments[f"{part}_lora_layers"] = {
            f"{name}.lora_{half}.weight": tensor.to(dtype).contiguous()
            for name, layer in own.items()
            for half, tensor in (("A", layer.down), ("B", layer.up))
        }
        arguments[f"{part}_lora_adapter_metadata"] = _adapter_config(own).to_dict()
    base.kind.save_lora_weights(path.parent, weight_name=path.name, **arguments)
    add_metadata(path, modelspec(base, path.stem, lora=True))


def _adapter_config(layers: dict[str, LoRALayer]) -> LoraConfig:
    """Return peft's configuration of the layers, with the most common rank and alpha as default."""
    rank = _most_common(layer.rank for layer in layers.values())
    alpha = _number(_most_common(layer.alpha for layer in layers.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_pattern(n, layers): x.rank for n, x in layers.items() if x.rank != rank},
        alpha_pattern={
            _pattern(n, layers): _number(x.alpha) for n, x in layers.items() if x.alpha != alpha
        },
        target_modules=sorted(layers),
    )


def _pattern(name: str, names: Iterable[str]) -> str:
    """Return peft's pattern of a layer, which also matches all layers that end with its name.

    It begins with ^ where there are such layers, as in FLUX.1, whose blocks have a `proj_out` too.
    """
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def write_kohya_lora(layers: Layers, path: Path, base: BasePipeline, dtype: torch.dtype) -> None:
    """Write a LoRA in kohya's layout.

    The layers of most denoisers have the names of the original code and those of SD 1.x and 2.x
    diffusers' names, as in the files of kohya's own trainer, which other programs support.

    Args:
        layers: Layers by part and module.
        path: The file.
        base: The pipeline that they belong to.
        dtype: Precision of the file.
    """
    family = base.family
    renamed = _renamed(layers, base, family.kohya_original)
    if family.one_alpha:
        renamed = _one_alpha(renamed)
    state: dict[str, Tensor] = {}
    for (part, name), layer in renamed.items():
        inner = name if part == family.denoiser.name else _with_text_model(name, part, base)
        key = f"{family.components[part].kohya}_{flat_name(inner)}"
        state[f"{key}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        state[f"{key}.lora_up.weight"] = layer.up.to(dtype).contiguous()
        state[f"{key}.alpha"] = torch.tensor(layer.alpha)
    ranks, alphas = ({getattr(x, a) for x in renamed.values()} for a in ("rank", "alpha"))
    save_file(
        state,
        path,
        modelspec(base, path.stem, lora=True)
        | {
            "ss_network_module": family.kohya_module,
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(_number(alphas.pop())) if len(alphas) == 1 else "Dynamic",
            "ss_base_model_version": base_version(base),
            "ss_sd_model_name": Path(base.name).name if Path(base.name).exists() else base.name,
            "ss_v2": str(family.kohya_v2),
        },
    )


def write_comfyui_lora(layers: Layers, path: Path, base: BasePipeline, dtype: torch.dtype) -> None:
    """Write a LoRA in ComfyUI's layout: the original names of most networks, with their dots.

    Args:
        layers: Layers by part and module.
        path: The file.
        base: The pipeline that they belong to.
        dtype: Precision of the file.
    """
    family = base.family
    state: dict[str, Tensor] = {}
    for (part, name), layer in _renamed(layers, base, family.comfyui_original).items():
        inner = name if part == family.denoiser.name else _with_text_model(name, part, base)
        key = f"{family.components[part].comfyui}{inner}"
        down, up = family.comfyui_halves
        state[f"{key}.{down}.weight"] = layer.down.to(dtype).contiguous()
        state[f"{key}.{up}.weight"] = layer.up.to(dtype).contiguous()
        state[f"{key}.alpha"] = torch.tensor(layer.alpha)
    save_file(state, path, modelspec(base, path.stem, lora=True))


def _renamed(
    layers: Layers, base: BasePipeline, original: bool
) -> dict[tuple[str, str], LoRALayer]:
    """Return the layers with the denoiser's names in the original code, if they are wanted."""
    if not original:
        return dict(layers)
    denoiser = base.family.denoiser
    own = {name: layer for (part, name), layer in layers.items() if part == denoiser.name}
    renamed = to_original(own, base.skeleton()[denoiser.name], denoiser)
    others = {key: layer for key, layer in layers.items() if key[0] != denoiser.name}
    return {(denoiser.name, name): layer for name, layer in renamed.items()} | others


def _with_text_model(name: str, part: str, base: BasePipeline) -> str:
    """Return the name of a text encoder's layer with `text_model.`, which CLIP's have in files."""
    if not base.family.components[part].class_name.startswith("CLIP"):
        return name
    short = name.removeprefix("text_model.")
    return short if short == "text_projection" else f"text_model.{short}"


def _one_alpha(layers: Layers) -> dict[tuple[str, str], LoRALayer]:
    """Return equivalent layers with the same alpha.

    Kohya's layout has an alpha per layer, but for attention layers diffusers 0.42 ignores those
    that differ from the most common one.
    """
    alpha = _most_common(layer.alpha for layer in layers.values()) or 1.0
    return {
        key: layer
        if layer.alpha == alpha
        else LoRALayer(layer.down, layer.up.float() * (layer.alpha / alpha), alpha)
        for key, layer in layers.items()
    }


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float:
    """Return an integral float as an int: 16, not 16.0."""
    return int(value) if value == int(value) else value
