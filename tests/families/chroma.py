"""Chroma."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import Chroma
from lit_prefopt.backbones.packing import pack
from tests.families.cases import Case, Models
from tests.helpers.tiny_chroma import tiny_chroma_pipeline


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """Chroma embeds the empty prompt B times; ours is embedded once and repeated."""
    if guidance == models.case.unguided:
        return {"guidance_scale": guidance}
    empty = models.backbone.empty.repeat(count)
    return {
        "guidance_scale": guidance,
        "negative_prompt_embeds": empty["hidden"],
        "negative_prompt_attention_mask": empty["mask"].to(empty["hidden"].dtype),
    }


CASES: dict[str, Case] = {
    "chroma": Case(Chroma, tiny_chroma_pipeline, arguments, start=pack, guided=5.0, calls=2),
}
