"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import StableDiffusion3
from tests.families.cases import Case, Models
from tests.helpers.tiny_sd3 import load_stock_sd3, tiny_sd3_pipeline, tiny_sd35_pipeline


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """Stable Diffusion 3 embeds the empty prompt B times; ours is embedded once and repeated."""
    empty = models.backbone.empty.repeat(count)
    return {
        "guidance_scale": guidance,
        "negative_prompt_embeds": empty["hidden"],
        "negative_pooled_prompt_embeds": empty["pooled"],
    }


CASES: dict[str, Case] = {
    "sd3": Case(StableDiffusion3, tiny_sd3_pipeline, arguments, load=load_stock_sd3),
    "sd35": Case(StableDiffusion3, tiny_sd35_pipeline, arguments, load=load_stock_sd3),
    "sd35-without-t5": Case(
        StableDiffusion3,
        lambda folder: tiny_sd35_pipeline(folder, t5=False),
        arguments,
        {"t5": False},
        load=load_stock_sd3,
    ),
}
