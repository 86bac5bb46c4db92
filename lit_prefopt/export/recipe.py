"""Read the trained pipeline from a run's recipe, as plain data.

A recipe that comes with weights may be untrusted: no class that it names is imported or built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_prefopt.errors import InputError

RECIPE = "recipe.yaml"


class Recipe(NamedTuple):
    """Components of the trained pipeline, named as in the backbones."""

    pretrained: str | None = None
    config: str | None = None
    variant: str | None = None
    denoiser: str | None = None
    vae: str | None = None
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    start_lora: str | None = None
    training_adapter: str | None = None
    t5: bool | None = None
    text_tokens: int | None = None
    lora: dict[str, Any] | None = None


_TOY_WORLD = Path(__file__).parent.parent / "toy"

TOYS = {
    "toy": Recipe(pretrained=str(_TOY_WORLD / "checkpoint")),
    "toy-flow": Recipe(pretrained=str(_TOY_WORLD / "flow_checkpoint"), t5=False, text_tokens=0),
}
"""The pipelines of the toy world by name, which its recipes may omit."""

_TOY_CLASSES = {"ToyDiffusion": "toy", "ToyConsistency": "toy", "ToyFlow": "toy-flow"}


def read_recipe(text: str, where: Path) -> Recipe:
    """Parse a recipe.

    Args:
        text: The recipe, as YAML.
        where: Its file, for messages.

    Raises:
        InputError: It names no backbone.
    """
    try:
        backbone = yaml.safe_load(text)["backbone"]
        arguments = dict(backbone.get("init_args") or {})
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The recipe of {where} names no backbone; it is damaged.") from error
    kind = str(backbone.get("class_path")).rpartition(".")[2]
    toy = TOYS[_TOY_CLASSES[kind]] if kind in _TOY_CLASSES else Recipe()
    lora = arguments.pop("lora", None)
    options: dict[str, Any] = {}
    for name, own in {"zero_terminal_snr": bool, "t5": bool, "text_tokens": int}.items():
        value = arguments.pop(name, None)
        options[name] = value if isinstance(value, own) else getattr(toy, name)
    arguments["pretrained"] = arguments.get("pretrained") or toy.pretrained
    if isinstance(lora, dict):  # a class may be named with its arguments, as `--backbone.lora LoRA`
        lora = lora.get("init_args", lora)
    options |= {name: str(arguments[name]) for name in Recipe._fields if arguments.get(name)}
    return Recipe(**options, lora=lora if isinstance(lora, dict) else None)


def recipe_in(folder: Path) -> Recipe:
    """Read the recipe in a folder; return an empty one if there is none."""
    file = folder / RECIPE
    return read_recipe(file.read_text("utf-8"), file) if file.is_file() else Recipe()
