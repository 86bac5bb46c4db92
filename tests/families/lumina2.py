"""Lumina Image 2.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import Lumina2Pipeline
from torch import Tensor

from lit_prefopt.backbones import Lumina2
from tests.families.cases import Case, Models, load_stock
from tests.helpers.tiny_lumina2 import tiny_lumina2_pipeline


def load(folder: Path, **options: Any) -> Lumina2Pipeline:
    """Load a stock pipeline that masks as ours does and embeds the empty prompt once.

    Where the mask is 0, ours has zeros, and the stock pipeline what Gemma makes of padding. Neither
    is read (`test_lumina2.py` compares images with an unchanged pipeline).

    Args:
        folder: Its folder.
        options: Further arguments of `from_pretrained`, such as `torch_dtype`.
    """
    stock = load_stock(folder, **options)
    embed = stock._get_gemma_prompt_embeds

    def masked(prompt: list[str], **how: Any) -> tuple[Tensor, Tensor]:
        texts = [*dict.fromkeys(prompt)]
        hidden, mask = embed(texts, **how)
        rows = [texts.index(text) for text in prompt]
        return hidden.masked_fill(mask[..., None] == 0, 0)[rows], mask[rows]

    stock._get_gemma_prompt_embeds = masked
    return stock


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """The negative prompt is the empty one, without a system prompt."""
    return {"guidance_scale": guidance}


CASES: dict[str, Case] = {
    "lumina2": Case(
        Lumina2,
        tiny_lumina2_pipeline,
        arguments,
        load=load,
        guided=4.0,
        calls=2,
        sizes=((64, 64), (96, 48)),
    )
}
