"""FLUX.1."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import Flux1
from lit_prefopt.backbones.packing import pack
from tests.families.cases import Case, Models
from tests.helpers.tiny_flux1 import tiny_flux1_pipeline, tiny_flux1_schnell_pipeline


def embedded(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """The guidance scale is an input of the transformer, and there is no negative prompt."""
    return {"guidance_scale": guidance}


def classifier_free(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """Without a guidance embedding, the stock pipeline's "true" guidance is classifier-free."""
    empty = models.backbone.empty.repeat(count)
    return {
        "true_cfg_scale": guidance,
        "negative_prompt_embeds": empty["hidden"],
        "negative_pooled_prompt_embeds": empty["pooled"],
    }


CASES: dict[str, Case] = {
    "flux1": Case(Flux1, tiny_flux1_pipeline, embedded, start=pack, guided=3.5),
    "flux1-schnell": Case(
        Flux1,
        tiny_flux1_schnell_pipeline,
        classifier_free,
        {"distilled": True},
        start=pack,
        guided=4.0,
        calls=2,
    ),
}
