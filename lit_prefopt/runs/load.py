"""Load backbone and module from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lit_prefopt.backbones import Backbone
from lit_prefopt.errors import InputError
from lit_prefopt.learner import Learner
from lit_prefopt.weights.checkpoint import RECIPE_KEY, parse_recipe, read_checkpoint


def load(path: str | Path, pretrained: str | None = None) -> Learner:
    """Load the module of a checkpoint: method or judge, with the trained weights.

    The recipe inside the checkpoint names classes that are imported and built, so load only
    checkpoints that you trust; use diffusers folders or LoRA files for other weights. VAE and
    text encoders are loaded too, even if the training ran without them.

    Args:
        path: A checkpoint of `lit-prefopt fit`.
        pretrained: New location of the backbone's frozen parts, if they were moved.

    Raises:
        InputError: The file is not such a checkpoint.
    """
    checkpoint = read_checkpoint(path, recipe=True)
    recipe = parse_recipe(checkpoint[RECIPE_KEY], path)
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_subclass_arguments(Learner, "model")
    parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")
    try:
        chosen = {key: recipe[key] for key in ("backbone", "model")}
        arguments: dict[str, Any] = chosen["backbone"].setdefault("init_args", {})
        if "encoders" in arguments:
            arguments["encoders"] = True
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The recipe in {path} names no backbone and model.") from error
    if pretrained is not None:
        arguments["pretrained"] = pretrained
    built = parser.instantiate(parser.parse_object(chosen))
    module: Learner = built.model
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module
