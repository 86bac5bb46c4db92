"""FLUX.2 klein."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import Flux2Klein
from tests.families.cases import Case, Models
from tests.helpers.tiny_flux2 import tiny_flux2_pipeline


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """FLUX.2 embeds the empty prompt B times; ours is embedded once and repeated."""
    empty = models.backbone.empty.repeat(count)
    return {"guidance_scale": guidance, "negative_prompt_embeds": empty["hidden"]}


CASES: dict[str, Case] = {
    "flux2-klein": Case(
        Flux2Klein,
        tiny_flux2_pipeline,
        arguments,
        guided=4.0,
        calls=2,
        sizes=((64, 64), (96, 64)),
    ),
}
