"""What is exported: a LoRA file, a UNet, a checkpoint of a run, or the run's folder.

A recipe that lies beside the weights is read as plain data. It may come from a stranger, so nothing
that it names is imported or built.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.export.base import Base, load_unet, load_unet_config
from lit_prefopt.export.lora_files import WEIGHTS, LoRAFile, LoRALayer, flat_name, read_lora

RECIPE = "recipe.yaml"
LAST = Path("checkpoints") / "last.ckpt"
DENOISER = "backbone.policy.denoiser."
TOY = Path(__file__).parent.parent / "toy" / "checkpoint"
"""The base of the toy world, whose recipes need not name it."""


class Origin(NamedTuple):
    """Trained weights, and what is known about the pipeline that they belong to."""

    name: str
    lora: LoRAFile | None = None
    unet: Path | dict[str, Tensor] | None = None  # all weights, by folder or by name
    base: str | None = None
    config: str | None = None
    variant: str | None = None
    denoiser: str | None = None  # the UNet that training started from, if not the base's own

    def load_unet(self, base: Base | None) -> UNet2DConditionModel:
        """Return the UNet with what was trained, or the one that a LoRA is to be merged into.

        Args:
            base: The pipeline that was trained; only a UNet's folder can do without.
        """
        if isinstance(self.unet, Path):
            return load_unet(str(self.unet))
        if base is None:
            raise missing_base(self.name)
        if self.unet is None:
            return base.unet() if self.denoiser is None else load_unet(self.denoiser)
        config = load_unet_config(self.denoiser) if self.denoiser else base.unet_config
        unet = UNet2DConditionModel.from_config(config)
        try:
            unet.load_state_dict(self.unet)
        except RuntimeError as error:
            raise InputError(
                f"{self.name} holds the weights of another UNet than {base.name} has: name the "
                "pipeline that was trained as `--base`."
            ) from error
        return unet


def missing_base(name: str) -> InputError:
    """Return what to say of weights whose pipeline is not known."""
    return InputError(
        f"{name} does not tell which pipeline was trained: name it as `--base`, a hub name or a "
        "folder."
    )


def read_origin(source: str) -> Origin:
    """Return what a path holds.

    Args:
        source: A LoRA's .safetensors file; a UNet's folder; a .ckpt that `lit-prefopt fit` wrote;
            a run's folder; or a whole pipeline's folder.

    Raises:
        InputError: It holds nothing of the kind.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"{source} does not exist; name a LoRA file, a UNet, a .ckpt or a run.")
    if path.suffix == ".ckpt":
        return _checkpoint(path)
    return Origin(source, read_lora(path), **_facts_beside(path.parent))


def _folder(folder: Path) -> Origin:
    name = str(folder)
    if (folder / "config.json").is_file():
        return Origin(name, unet=folder, **_facts_beside(folder.parent))
    if (folder / "model_index.json").is_file():
        return Origin(name, unet=folder / "unet", base=name)
    if (folder / WEIGHTS).is_file():
        return Origin(name, read_lora(folder), **_facts_beside(folder))
    if (folder / "unet" / "config.json").is_file():
        return Origin(name, unet=folder / "unet", **_facts_beside(folder))
    if (folder / "weights").is_dir():
        return _folder(folder / "weights")
    if (folder / LAST).is_file():
        return _checkpoint(folder / LAST)
    raise InputError(
        f"{folder} holds neither weights nor checkpoints/last.ckpt: name a LoRA file, a UNet, a "
        ".ckpt or a run."
    )


def _facts_beside(folder: Path) -> dict[str, Any]:
    """Return what the recipe beside the weights says, if there is one."""
    recipe = folder / RECIPE
    return _facts(_backbone(recipe.read_text("utf-8"), recipe)) if recipe.is_file() else {}


def _backbone(text: str, where: Path) -> dict[str, Any]:
    """Return a recipe's arguments of the backbone, as plain data."""
    try:
        recipe = yaml.safe_load(text)
        backbone = recipe["backbone"]
        arguments: dict[str, Any] = dict(backbone.get("init_args") or {})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The recipe of {where} names no backbone; it is damaged.") from error
    if str(backbone.get("class_path")).endswith(".ToyDiffusion"):
        arguments["pretrained"] = str(TOY)
    return arguments


def _facts(backbone: dict[str, Any]) -> dict[str, Any]:
    names = {"base": "pretrained", "config": "config", "variant": "variant", "denoiser": "denoiser"}
    return {ours: str(backbone[key]) for ours, key in names.items() if backbone.get(key)}


def _checkpoint(path: Path) -> Origin:
    """Return the trained weights of a training checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, recipe = checkpoint["state_dict"], checkpoint["recipe"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            f"{path} is no checkpoint that `lit-prefopt fit` wrote (weights and a recipe, and "
            "nothing that would have to be run)."
        ) from error
    backbone = _backbone(recipe, path)
    weights = {k.removeprefix(DENOISER): v for k, v in state.items() if k.startswith(DENOISER)}
    others = [k for k in state if k.startswith("backbone.") and not k.startswith(DENOISER)]
    if others or not weights:
        raise InputError(
            f"{path} holds {others[0] if others else 'no denoiser'}, which has no place in an "
            "export: only a trained denoiser has."
        )
    if backbone.get("lora") is None:
        return Origin(str(path), unet=weights, **_facts(backbone))
    return Origin(str(path), _adapter(path, weights, backbone["lora"]), **_facts(backbone))


def _adapter(path: Path, weights: dict[str, Tensor], lora: dict[str, Any]) -> LoRAFile:
    """Return the LoRA of a checkpoint; its alpha stands in the recipe."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.\w+\.weight", key)
        if found is None:
            raise InputError(f"{path} holds {key!r}, which is no plain LoRA.")
        halves.setdefault(found[1], {})[found[2]] = tensor
    alpha = lora.get("alpha")
    return LoRAFile(
        str(path),
        {
            ("unet", flat_name(name)): LoRALayer(
                half["A"], half["B"], float(len(half["A"]) if alpha is None else alpha)
            )
            for name, half in halves.items()
        },
    )
