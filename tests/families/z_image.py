"""Z-Image, and Z-Image-Turbo, which differs in its scheduler's shift alone."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import ZImage
from tests.families.cases import Case, Models
from tests.helpers.tiny_z_image import tiny_z_image_pipeline


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """Z-Image embeds the empty prompt B times; ours is embedded once and repeated."""
    empty = [*models.backbone.empty.repeat(count).ragged("hidden")]
    return {"guidance_scale": guidance, "negative_prompt_embeds": empty}


OPTIONS: dict[str, Any] = {"unguided": 0.0, "guided": 5.0, "time": "t"}

CASES: dict[str, Case] = {
    "z-image": Case(ZImage, tiny_z_image_pipeline, arguments, **OPTIONS),
    "z-image-turbo": Case(
        ZImage,
        lambda folder: tiny_z_image_pipeline(folder, shift=3.0),
        arguments,
        {"distilled": True},
        **OPTIONS,
    ),
}
