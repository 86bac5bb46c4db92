"""From a checkpoint back to backbone and module."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_prefopt.backbones import Backbone
from lit_prefopt.errors import InputError
from lit_prefopt.learner import Learner


def load(path: str | Path, pretrained: str | None = None) -> Learner:
    """Return the module of a checkpoint: method or judge, with the trained weights in it.

    The recipe inside the checkpoint names classes that are imported and built. Load only what you
    would also run; weights from elsewhere come as diffusers folders or LoRA files. VAE and text
    encoders are loaded too, where the training did without them.

    Args:
        path: A checkpoint that `lit-prefopt fit` wrote.
        pretrained: Where the backbone's frozen parts lie now, if not where the recipe says.

    Raises:
        InputError: The file is no such checkpoint.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "recipe" not in checkpoint:
        raise InputError(f"{path} holds no recipe: name a checkpoint that `lit-prefopt fit` wrote.")
    recipe = yaml.safe_load(checkpoint["recipe"])
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_subclass_arguments(Learner, "model")
    parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")
    chosen = {key: recipe[key] for key in ("backbone", "model")}
    if "encoders" in chosen["backbone"]["init_args"]:
        chosen["backbone"]["init_args"]["encoders"] = True
    if pretrained is not None:
        chosen["backbone"]["init_args"]["pretrained"] = pretrained
    built = parser.instantiate(parser.parse_object(chosen))
    module: Learner = built.model
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module
