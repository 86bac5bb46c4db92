"""Read the trained pipeline from a run's recipe, as plain data.

A recipe that comes with weights may be untrusted: no class that it names is imported or built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_prefopt.errors import InputError

RECIPE = "recipe.yaml"
TOY = Path(__file__).parent.parent / "toy" / "checkpoint"
TOY_FLOW = TOY.with_name("flow_checkpoint")
"""The pipelines of the toy world, which its recipes may omit."""


class Recipe(NamedTuple):
    """Components of the trained pipeline, named as in the backbones."""

    pretrained: str | None = None
    config: str | None = None
    variant: str | None = None
    denoiser: str | None = None
    vae: str | None = None
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    t5: bool | None = None
    text_tokens: int | None = None
    start_lora: str | None = None
    lora: dict[str, Any] | None = None


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
    kind = str(backbone.get("class_path"))
    unnamed = kind.endswith(".ToyConsistency") and not arguments.get("pretrained")
    if kind.endswith(".ToyDiffusion") or unnamed:
        arguments["pretrained"] = str(TOY)
    if kind.endswith(".ToyFlow"):
        arguments |= {"pretrained": arguments.get("pretrained") or str(TOY_FLOW)}
        arguments |= {"t5": False, "text_tokens": 0}
    lora, zero_snr = arguments.pop("lora", None), arguments.pop("zero_terminal_snr", None)
    t5, text_tokens = arguments.pop("t5", None), arguments.pop("text_tokens", None)
    if isinstance(lora, dict):  # a class may be named with its arguments, as `--backbone.lora LoRA`
        lora = lora.get("init_args", lora)
    places = {name: str(arguments[name]) for name in Recipe._fields if arguments.get(name)}
    return Recipe(
        **places,
        zero_terminal_snr=zero_snr if isinstance(zero_snr, bool) else None,
        t5=t5 if isinstance(t5, bool) else None,
        text_tokens=text_tokens if isinstance(text_tokens, int) else None,
        lora=lora if isinstance(lora, dict) else None,
    )


def recipe_in(folder: Path) -> Recipe:
    """Read the recipe in a folder; return an empty one if there is none."""
    file = folder / RECIPE
    return read_recipe(file.read_text("utf-8"), file) if file.is_file() else Recipe()
