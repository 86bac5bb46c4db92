"""Metadata of exported files, by which other programs recognise them."""

from __future__ import annotations

from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.processes.marks import mark_metadata

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


def base_version(base: BasePipeline) -> str:
    """Return kohya's name of the family (`ss_base_model_version`)."""
    return base.family.kohya_version(base.denoiser_config, base.v_prediction)


def modelspec(base: BasePipeline, title: str, lora: bool) -> dict[str, str]:
    """Return the metadata of Stability AI's model specification 1.0.0.

    Args:
        base: The pipeline that the weights belong to.
        title: Title of the file.
        lora: Whether the file contains only a LoRA.
    """
    architecture = base.family.architecture(base.denoiser_config, base.v_prediction)
    side = base.side
    resolution = {} if side is None else {"modelspec.resolution": f"{side}x{side}"}
    marks = {}
    if base.family.noise == "ddpm":
        marks = mark_metadata(base.v_prediction, base.zero_terminal_snr)
    if not lora:  # kohya's fields are those of its LoRAs
        marks = {name: value for name, value in marks.items() if not name.startswith("ss_")}
    return resolution | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if lora else ""),
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        **marks,
    }
