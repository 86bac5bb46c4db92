"""Qwen-Image."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import QwenImage
from lit_prefopt.backbones.packing import pack
from tests.families.cases import Case, Models
from tests.helpers.tiny_qwen_image import tiny_qwen_image_pipeline


def arguments(models: Models, count: int, guidance: float) -> dict[str, Any]:
    """Qwen-Image embeds the empty prompt B times; ours is embedded once and repeated."""
    if guidance == models.case.unguided:
        return {"true_cfg_scale": guidance}
    empty, mask = models.backbone.empty.repeat(count).ragged("hidden").padded()
    return {
        "true_cfg_scale": guidance,
        "negative_prompt_embeds": empty,
        "negative_prompt_embeds_mask": mask.long(),
    }


CASES: dict[str, Case] = {
    f"qwen-image-{factor}": Case(
        QwenImage,
        lambda folder, factor=factor: tiny_qwen_image_pipeline(folder, factor),
        arguments,
        start=pack,
        guided=4.0,
        calls=2,
        sizes=sizes,
    )
    for factor, sizes in ((8, ((64, 64), (96, 48))), (4, ((32, 32), (40, 24))))
}
