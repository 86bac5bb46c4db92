"""Read the weights to export: a LoRA file, a denoiser, a checkpoint, or a run's folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.recipe import Recipe, read_recipe, recipe_in
from lit_prefopt.families.base import Component
from lit_prefopt.families.known import DENOISERS, FAMILIES, denoiser_of
from lit_prefopt.families.lora_prefixes import DENOISER
from lit_prefopt.weights.checkpoint import read_checkpoint
from lit_prefopt.weights.checks import check_finite, some_names
from lit_prefopt.weights.lora_files import (
    LoRAFile,
    LoRALayer,
    flat_name,
    is_lora_folder,
    read_lora,
)

LAST = Path("checkpoints") / "last.ckpt"
STATE = "backbone.policy.denoiser."
"""Beginning of a checkpoint's keys of the trained weights."""


class TrainedWeights(NamedTuple):
    """Trained weights, with the recipe of their pipeline.

    They are a LoRA, or all weights of a denoiser, in a folder or by name.
    """

    name: str
    recipe: Recipe
    lora: LoRAFile | None = None
    denoiser: Path | dict[str, Tensor] | None = None

    @property
    def component(self) -> Component | None:
        """Component of a denoiser's folder by its configuration, or None."""
        if not isinstance(self.denoiser, Path):
            return None
        stated = json.loads((self.denoiser / "config.json").read_text("utf-8")).get("_class_name")
        found = denoiser_of(stated)
        if found is None:
            known = ", ".join(dict.fromkeys(f.denoiser.class_name for f in FAMILIES))
            raise InputError(f"{self.denoiser} is a {stated!s:.80}; supported are {known}.")
        return found

    def load_denoiser(self, base: BasePipeline | None) -> Any:
        """Load the denoiser with the trained weights, or the one to merge a LoRA into.

        Args:
            base: The pipeline that was trained; optional only for a denoiser's folder.
        """
        part = self.component if base is None else base.family.denoiser
        if part is not None and isinstance(self.denoiser, Path):
            return load_component(part.kind, str(self.denoiser), part.name, torch.float32)
        if part is None or base is None:
            raise missing_base(self.name)
        denoiser = self.recipe.denoiser
        own = (
            load_component(
                part.kind, denoiser, part.name, torch.float32, config=lambda: base.denoiser_config
            )
            if denoiser
            else None
        )
        if self.denoiser is None:
            return own or base.denoiser()
        assert isinstance(self.denoiser, dict)
        added = part.stored_guidance(self.denoiser)  # by a distillation
        net = own or part.kind.from_config(base.denoiser_config | added)
        try:
            net.load_state_dict(self.denoiser)
        except RuntimeError as error:
            raise InputError(
                f"The weights of {self.name} do not fit the {part.name} of {base.name}: name the "
                "pipeline that was trained as `--base`."
            ) from error
        return net


def missing_base(name: str) -> InputError:
    """Return the error for weights of an unknown pipeline."""
    return InputError(
        f"{name} has no recipe that names the trained pipeline: name it as `--base`, a hub name or "
        "a folder."
    )


def read_trained_weights(source: str) -> TrainedWeights:
    """Read the trained weights of a path.

    Args:
        source: A LoRA's .safetensors file; a denoiser's folder; a .ckpt that `lit-prefopt fit`
            wrote; a run's folder; or a whole pipeline's folder.

    Raises:
        InputError: It contains no such weights.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(
            f"{source} does not exist; name a LoRA file, a denoiser, a .ckpt or a run."
        )
    if path.suffix == ".ckpt":
        return _checkpoint(path)
    return TrainedWeights(source, recipe_in(path.parent), read_lora(path))


def _folder(folder: Path) -> TrainedWeights:
    name = str(folder)
    if (folder / "config.json").is_file():
        return TrainedWeights(name, recipe_in(folder.parent), denoiser=folder)
    inner = next((folder / x for x in DENOISERS if (folder / x / "config.json").is_file()), None)
    if (folder / "model_index.json").is_file():
        if inner is None:
            raise InputError(f"{name} has no {' and no '.join(DENOISERS)}: name a whole pipeline.")
        return TrainedWeights(name, Recipe(pretrained=name), denoiser=inner)
    if is_lora_folder(folder):
        return TrainedWeights(name, recipe_in(folder), read_lora(folder))
    if inner is not None:
        return TrainedWeights(name, recipe_in(folder), denoiser=inner)
    if (folder / "weights").is_dir():
        return _folder(folder / "weights")
    if (folder / LAST).is_file():
        return _checkpoint(folder / LAST)
    raise InputError(
        f"{folder} contains neither weights nor checkpoints/last.ckpt: name a LoRA file, a "
        "denoiser, a .ckpt or a run."
    )


def _checkpoint(path: Path) -> TrainedWeights:
    """Read the trained weights of a training checkpoint."""
    checkpoint = read_checkpoint(path, recipe=True)
    state, text = checkpoint["state_dict"], checkpoint["recipe"]
    recipe = read_recipe(text, path)
    weights = {k.removeprefix(STATE): v for k, v in state.items() if k.startswith(STATE)}
    others = [k for k in state if k.startswith("backbone.") and not k.startswith(STATE)]
    if others or not weights:
        raise InputError(
            f"{path} contains {some_names(others, 1) or 'no denoiser'}, which cannot be exported: "
            "name a checkpoint of a trained denoiser."
        )
    check_finite(weights, str(path), "name a checkpoint from before the run diverged")
    if recipe.lora is None:
        return TrainedWeights(str(path), recipe, denoiser=weights)
    return TrainedWeights(str(path), recipe, _adapter(path, weights, recipe.lora.get("alpha")))


def _adapter(path: Path, weights: dict[str, Tensor], alpha: object) -> LoRAFile:
    """Return the LoRA of a checkpoint, with alpha from the recipe."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.\w+\.weight", key)
        if found is None:
            raise InputError(f"{path} contains {some_names([key])}, which is not a plain LoRA.")
        halves.setdefault(found[1], {})[found[2]] = tensor
    if broken := [name for name, half in halves.items() if len(half) < 2]:
        raise InputError(f"{path} contains only one matrix of {some_names(broken)}; it is damaged.")
    if not (alpha is None or (isinstance(alpha, int | float) and math.isfinite(alpha))):
        raise InputError(f"The recipe of {path} has an alpha that is not a finite number.")
    return LoRAFile(
        str(path),
        {
            (DENOISER, flat_name(name)): LoRALayer(
                half["A"], half["B"], float(len(half["A"]) if alpha is None else alpha)
            )
            for name, half in halves.items()
        },
    )
