"""Metadata of exported files, by which other programs recognise them."""

from __future__ import annotations

from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.processes.marks import mark_metadata

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


def base_version(base: BasePipeline) -> str:
    """Return kohya's name of the family (`ss_base_model_version`)."""
    if base.family == "sdxl":
        return "sdxl_base_v1-0"
    return {"sd1": "sd_v1", "sd2": "sd_v2"}[base.family] + ("_v" if base.v_prediction else "")


def modelspec(base: BasePipeline, title: str, lora: bool) -> dict[str, str]:
    """Return the metadata of Stability AI's model specification 1.0.0.

    Args:
        base: The pipeline that the weights belong to.
        title: Title of the file.
        lora: Whether the file contains only a LoRA.
    """
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if base.v_prediction else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[base.family]
    side = base.side
    resolution = {} if side is None else {"modelspec.resolution": f"{side}x{side}"}
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
