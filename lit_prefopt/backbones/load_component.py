"""Load one component of a model from the hub, a diffusers folder, or a .safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lit_prefopt.backbones.component_checks import check_class
from lit_prefopt.configs import find_config
from lit_prefopt.errors import InputError
from lit_prefopt.families.known import find_component
from lit_prefopt.utils.meta import build_on_meta, on_meta
from lit_prefopt.weights.checks import check_weights, first_line
from lit_prefopt.weights.component_files import WeightsFile, load_from_file
from lit_prefopt.weights.hub import check_reachable

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")
"""Ends of the names of files; all but the first are refused."""

VARIANTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)"
)
"""Names of files of weights, with their variant."""

Config = Callable[[], dict[str, Any]]
"""Function that returns the configuration of a component."""


def load_component(
    kind: Any,
    source: str,
    name: str,
    dtype: torch.dtype,
    variant: str | None = None,
    config: Config | None = None,
    **options: Any,
) -> Any:
    """Load a component of a pipeline, from a pipeline or by itself.

    Args:
        kind: The diffusers class.
        source: Hub name or folder of the component or of a pipeline; a .safetensors file of one; or
            a .json configuration, whose weights are initialised at random.
        name: The component's folder inside a pipeline.
        dtype: Precision of the weights.
        variant: Variant of the files.
        config: Configuration of the component, which a .safetensors file does not contain.
        options: Further arguments of `from_pretrained`.

    Raises:
        InputError: It is none, or its weights are incomplete or not finite.
    """
    if source.endswith(".json"):
        stated = json.loads(find_config(source).read_text("utf-8"))
        if on_meta():
            return build_on_meta(lambda: kind.from_config(stated), dtype)
        return kind.from_config(stated).to(dtype)
    if source.endswith(SINGLE_FILES):
        return _from_file(kind, source, name, dtype, config)
    check_reachable(source)
    alone = check_class(kind, source, name)
    return from_folder(
        kind, source, None if alone else name, name, variant, torch_dtype=dtype, **options
    )


def from_folder(
    kind: Any, source: str, subfolder: str | None, name: str, variant: str | None, **options: Any
) -> Any:
    """Load a network of diffusers or transformers from the hub or a folder, and check its weights.

    Args:
        kind: The network's class.
        source: Hub name or folder.
        subfolder: Its folder there.
        name: Its name in a pipeline, for messages.
        variant: Variant of the files; if a folder has no others, the only one that it has.
        options: Further arguments of `from_pretrained`.

    Raises:
        InputError: It cannot be loaded, or its weights are incomplete or not finite.
    """
    folder = Path(source) / (subfolder or "")
    if on_meta():
        with component_errors(source, name):
            build = _by_config(kind, source, subfolder)
            return build_on_meta(build, options.get("torch_dtype") or options["dtype"]).eval()
    with component_errors(source, name):
        model, found = kind.from_pretrained(
            source,
            subfolder=subfolder,
            variant=find_variant(folder, variant),
            output_loading_info=True,
            **options,
        )
    check_weights(model, f"The {name} of {source}", found["missing_keys"])
    return model


def _by_config(kind: Any, source: str, subfolder: str | None) -> Callable[[], Any]:
    """Return a function that builds a network by its configuration alone."""
    if hasattr(kind, "load_config"):  # of diffusers
        config = kind.load_config(source, subfolder=subfolder)
        return lambda: kind.from_config(config)
    stated = kind.config_class.from_pretrained(
        source, subfolder=subfolder or "", trust_remote_code=False
    )
    return lambda: kind(stated)


def find_variant(folder: Path, variant: str | None) -> str | None:
    """Return the variant of a folder's weights that can be loaded.

    Args:
        folder: Folder of a component; one that does not exist may be on the hub.
        variant: The variant that is wanted, or None for the plain files.
    """
    files = folder.iterdir() if folder.is_dir() else ()
    variants = {found[1] for file in files if (found := VARIANTS.fullmatch(file.name))}
    if not variants or variant in variants:
        return variant
    if None in variants:  # a component without the variant has plain files, as on the hub
        return None
    if len(variants) > 1:
        raise InputError(
            f"{folder} has only the variants {', '.join(sorted(map(str, variants)))}: name one as "
            "`--backbone.variant` (`--variant` of an export)."
        )
    return variants.pop()


def _from_file(kind: Any, source: str, name: str, dtype: torch.dtype, config: Config | None) -> Any:
    component = find_component(name, kind.__name__)
    if component is None or config is None:
        raise InputError(
            f"{source} is a file: a {kind.__name__} is loaded from a folder in diffusers' layout "
            "or a hub name."
        )
    file = WeightsFile(source)
    stated = dict(config())
    if component.guidance is not None:
        setting, weight = component.guidance
        key = next((key for key in file.keys if key.endswith(weight)), None)
        stated[setting] = None if key is None else file.read(key).shape[1]
    return load_from_file(
        lambda: kind.from_config(stated), file, component, dtype, "the pipeline that it is used in"
    )


def component_config(kind: Any, source: str, name: str) -> dict[str, Any]:
    """Load the configuration of a component, from the source that `load_component` takes."""
    check_reachable(source)
    with component_errors(source, name):
        try:
            config: dict[str, Any] = kind.load_config(source, subfolder=name)
        except OSError:
            config = kind.load_config(source)
        return config


@contextmanager
def component_errors(source: str, name: str) -> Iterator[None]:
    """Raise InputError for errors of diffusers and transformers in loading files.

    Args:
        source: Hub name or folder.
        name: The component, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(
            f"{source} has no {name} that can be loaded ({first_line(error)}): give a folder or a "
            "hub name of one, or of a complete pipeline."
        ) from error
