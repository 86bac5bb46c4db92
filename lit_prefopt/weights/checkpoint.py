"""Read checkpoints of `lit-prefopt fit`, and describe what is wrong with others."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_prefopt.errors import InputError

Parts = Mapping[str, type]

WEIGHT_PARTS: Parts = {"state_dict": dict}
"""Parts of which weights are read, with their types."""

RUN_PARTS: Parts = {**WEIGHT_PARTS, "global_step": int, "pytorch-lightning_version": str}
"""Parts of which a run validates or tests."""

RESUME_PARTS: Parts = {
    **RUN_PARTS,
    "loops/fit_loop": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Parts from which a run is resumed; a checkpoint of weights only lacks some."""

RECIPE_KEY = "recipe"


def read_checkpoint(
    path: str | Path, parts: Parts = WEIGHT_PARTS, *, recipe: bool = False, whole: bool = True
) -> dict[str, Any]:
    """Load a checkpoint on the CPU, memory-mapped, and check all that a reader relies on.

    Args:
        path: The file.
        parts: Parts that it must have, with their types.
        recipe: Whether it must contain a recipe, as those of the command line do.
        whole: Whether to compare the checksums too, which reads the file once.

    Raises:
        InputError: The file cannot be read, is damaged, or is not a checkpoint of
            `lit-prefopt fit`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a FIFO would wait for its writer
        raise InputError(f"{path} is not a file, so it is not a checkpoint of `lit-prefopt fit`.")
    try:
        if whole and not is_complete(path):
            raise InputError(
                f"{path} is damaged, truncated, or is not a checkpoint of `lit-prefopt fit`."
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # of arbitrary bytes, unpickling raises almost anything
        raise InputError(
            f"{path} is damaged, or is not a checkpoint of `lit-prefopt fit`, which has no pickled "
            "code."
        ) from error
    check_parts(checkpoint, str(path), parts)
    if RECIPE_KEY in checkpoint:
        parse_recipe(checkpoint[RECIPE_KEY], path)
    elif recipe:
        raise InputError(
            f"{path} contains no recipe, so it is not a checkpoint of `lit-prefopt fit`."
        )
    return dict(checkpoint)


def check_parts(checkpoint: object, name: str, parts: Parts) -> None:
    """Check that a checkpoint has all parts that are needed.

    Args:
        checkpoint: The checkpoint.
        name: What it is called in messages.
        parts: The parts, with their types.

    Raises:
        InputError: A part is missing or has another type.
    """
    held = checkpoint if isinstance(checkpoint, Mapping) else {}
    for part, kind in parts.items():
        *outer, key = part.split("/")
        found = held.get(outer[0]) if outer else held
        if isinstance(found, Mapping) and isinstance(found.get(key), kind):
            continue
        if part in RUN_PARTS:
            raise InputError(
                f"{name} has no valid {part}, so it is not a checkpoint of `lit-prefopt fit`."
            )
        raise InputError(
            f"{name} has no valid {part}, so no run can be resumed from it: use one that was saved "
            "without `save_weights_only`, or `lit-prefopt export` its weights and start from them."
        )
    if not all(isinstance(weight, Tensor) for weight in held["state_dict"].values()):
        raise InputError(f"The state_dict of {name} contains more than tensors.")


def parse_recipe(text: object, path: str | Path) -> dict[str, Any]:
    """Parse the recipe of a checkpoint.

    Args:
        text: The recipe, as YAML.
        path: The checkpoint, for messages.

    Raises:
        InputError: It is not a recipe.
    """
    try:
        recipe = yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"The recipe in {path} is not valid YAML: {path} is damaged.") from error
    if not isinstance(recipe, dict):
        raise InputError(f"The recipe in {path} has no keys: {path} is damaged.")
    return recipe


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint file is complete: all of its parts exist with valid checksums.

    Reads the file once.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError):
        return False  # a RuntimeError where a flipped bit marks a part as encrypted


def fault(path: Path, parts: Parts, *, recipe: bool = False) -> str | None:
    """Return a sentence on what is wrong with a checkpoint file, or None.

    Args:
        path: The file, which is read once.
        parts: Parts that it must have, with their types.
        recipe: Whether it must contain a recipe, as those of the command line do.
    """
    try:
        read_checkpoint(path, parts, recipe=recipe)
    except InputError as error:
        return str(error)
    return None
