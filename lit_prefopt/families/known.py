"""Find the family of a pipeline, of a denoiser or of a backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component, Config, Family
from lit_prefopt.families.chroma import CHROMA
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.families.lumina2 import LUMINA2
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.families.stable_diffusion import SD1, SD2
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.families.stable_diffusion_xl import SDXL
from lit_prefopt.families.z_image import Z_IMAGE

FAMILIES = (SD1, SD2, SDXL, SD3, FLUX1, FLUX2, QWEN_IMAGE, LUMINA2, Z_IMAGE, CHROMA)

DENOISERS = tuple(dict.fromkeys(family.denoiser.name for family in FAMILIES))
"""Names of the denoisers' folders: `unet`, `transformer`."""


def family_of(
    pipeline: object, source: str, text_config: Callable[[], Config] | None = None
) -> Family:
    """Return the family of a pipeline.

    Args:
        pipeline: The pipeline's class, as its model_index.json names it.
        source: Hub name, folder or file, for messages.
        text_config: Loads the configuration of its first text encoder, which tells families of
            one class apart; the first of them if not given.

    Raises:
        InputError: No family has such pipelines.
    """
    found = [family for family in FAMILIES if pipeline in family.pipelines]
    if not found:
        known = ", ".join(dict.fromkeys(name for f in FAMILIES for name in f.pipelines))
        raise InputError(f"{source} is a {pipeline!s:.80}; supported are {known}.")
    if len(found) > 1 and text_config is not None:
        config = text_config()
        found = [family for family in found if family.is_own(config)] or found
    return found[0]


def other_model(names: Iterable[str], family: Family, config: Config) -> str | None:
    """Return the title of the model that metadata of a LoRA name, if it is another than this.

    Names that no family knows are passed over, and so are all if one of them is this model's.

    Args:
        names: Names of the model that the LoRA was trained on, in the forms of several programs.
        family: Family of the model that it is loaded into.
        config: Configuration of this model's denoiser.
    """
    plain = [re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("/lora")) for name in names]
    titles = [
        title
        for one in FAMILIES
        for pattern, title in one.stated.items()
        if any(re.fullmatch(pattern, name) for name in plain)
    ]
    title = family.model_title(config)
    own = {title} if title else {*family.stated.values()}
    return None if own & {*titles} else next(iter(titles), None)


def find_component(name: str, class_name: str) -> Component | None:
    """Return a component by its name in a pipeline and its class, or None.

    Args:
        name: The name, such as `text_encoder_2`.
        class_name: The class of diffusers or transformers.
    """
    parts = (part for family in FAMILIES for part in family.components.values())
    return next(
        (part for part in parts if (part.name, part.class_name) == (name, class_name)), None
    )


def denoiser_of(class_name: object) -> Component | None:
    """Return the denoiser of a diffusers class name, or None.

    Args:
        class_name: The class, as a config.json names it.
    """
    return next((f.denoiser for f in FAMILIES if f.denoiser.class_name == class_name), None)
