"""What is exported: a LoRA file, a UNet, a checkpoint of a run, or the run's folder."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_prefopt.backbones.loading import load_component
from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.recipe import Recipe, read_recipe, recipe_in
from lit_prefopt.weights.lora_files import WEIGHTS, LoRAFile, LoRALayer, flat_name, read_lora

LAST = Path("checkpoints") / "last.ckpt"
DENOISER = "backbone.policy.denoiser."


class TrainedWeights(NamedTuple):
    """Trained weights, and what is known about the pipeline that they belong to.

    They are a LoRA, or all weights of a UNet, in a folder or by name.
    """

    name: str
    recipe: Recipe
    lora: LoRAFile | None = None
    unet: Path | dict[str, Tensor] | None = None

    def load_unet(self, base: BasePipeline | None) -> UNet2DConditionModel:
        """Return the UNet with what was trained, or the one that a LoRA is to be merged into.

        Args:
            base: The pipeline that was trained; only a UNet's folder can do without.
        """
        if isinstance(self.unet, Path):
            return load_component(UNet2DConditionModel, str(self.unet), "unet", torch.float32)
        if base is None:
            raise missing_base(self.name)
        denoiser = self.recipe.denoiser
        own = (
            load_component(UNet2DConditionModel, denoiser, "unet", torch.float32)
            if denoiser
            else None
        )
        if self.unet is None:
            return own or base.unet()
        unet = own or UNet2DConditionModel.from_config(base.unet_config | _added(self.unet))
        try:
            unet.load_state_dict(self.unet)
        except RuntimeError as error:
            raise InputError(
                f"{self.name} holds the weights of another UNet than {base.name} has: name the "
                "pipeline that was trained as `--base`."
            ) from error
        return unet


def _added(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return what a distillation added to a UNet's configuration: a guidance embedding."""
    layer = weights.get("time_embedding.cond_proj.weight")
    return {} if layer is None else {"time_cond_proj_dim": layer.shape[1]}


def missing_base(name: str) -> InputError:
    """Return what to say of weights whose pipeline is not known."""
    return InputError(
        f"{name} does not tell which pipeline was trained: name it as `--base`, a hub name or a "
        "folder."
    )


def read_trained_weights(source: str) -> TrainedWeights:
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
    return TrainedWeights(source, recipe_in(path.parent), read_lora(path))


def _folder(folder: Path) -> TrainedWeights:
    name = str(folder)
    if (folder / "config.json").is_file():
        return TrainedWeights(name, recipe_in(folder.parent), unet=folder)
    if (folder / "model_index.json").is_file():
        return TrainedWeights(name, Recipe(pretrained=name), unet=folder / "unet")
    if (folder / WEIGHTS).is_file():
        return TrainedWeights(name, recipe_in(folder), read_lora(folder))
    if (folder / "unet" / "config.json").is_file():
        return TrainedWeights(name, recipe_in(folder), unet=folder / "unet")
    if (folder / "weights").is_dir():
        return _folder(folder / "weights")
    if (folder / LAST).is_file():
        return _checkpoint(folder / LAST)
    raise InputError(
        f"{folder} holds neither weights nor checkpoints/last.ckpt: name a LoRA file, a UNet, a "
        ".ckpt or a run."
    )


def _checkpoint(path: Path) -> TrainedWeights:
    """Return the trained weights of a training checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, text = checkpoint["state_dict"], checkpoint["recipe"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            f"{path} is no checkpoint that `lit-prefopt fit` wrote (weights and a recipe, and "
            "nothing that would have to be run)."
        ) from error
    recipe = read_recipe(text, path)
    weights = {k.removeprefix(DENOISER): v for k, v in state.items() if k.startswith(DENOISER)}
    others = [k for k in state if k.startswith("backbone.") and not k.startswith(DENOISER)]
    if others or not weights:
        raise InputError(
            f"{path} holds {others[0] if others else 'no denoiser'}, which has no place in an "
            "export: only a trained denoiser has."
        )
    if recipe.lora is None:
        return TrainedWeights(str(path), recipe, unet=weights)
    return TrainedWeights(str(path), recipe, _adapter(path, weights, recipe.lora.get("alpha")))


def _adapter(path: Path, weights: dict[str, Tensor], alpha: float | None) -> LoRAFile:
    """Return the LoRA of a checkpoint; its alpha stands in the recipe."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.\w+\.weight", key)
        if found is None:
            raise InputError(f"{path} holds {key!r}, which is no plain LoRA.")
        halves.setdefault(found[1], {})[found[2]] = tensor
    return LoRAFile(
        str(path),
        {
            ("unet", flat_name(name)): LoRALayer(
                half["A"], half["B"], float(len(half["A"]) if alpha is None else alpha)
            )
            for name, half in halves.items()
        },
    )
