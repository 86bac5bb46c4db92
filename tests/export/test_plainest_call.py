"""What is shipped and exported in half precision runs in stock diffusers' plainest call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
)

from lit_prefopt.toy.backbone import CHECKPOINT
from tests.helpers.exporting import Family, export, picture

HALF = ("--dtype", "float16")


def runs(kind: type[DiffusionPipeline], folder: Path) -> None:
    """Check that a folder's pipeline draws a picture without any option, and with its precision."""
    plain = kind.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    assert picture(plain).isfinite().all()
    assert plain.text_encoder.dtype == plain.unet.dtype == torch.float32
    half = kind.from_pretrained(folder, torch_dtype=torch.float16)
    assert half.text_encoder.dtype == half.unet.dtype == torch.float16


def test_the_shipped_checkpoint() -> None:
    runs(StableDiffusionPipeline, CHECKPOINT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exported_pipelines(dtype: str, family: Family, tmp_path: Path) -> None:
    out = export(Path(family.folder), "pipeline", tmp_path / "out", "--dtype", dtype)
    runs(family.kind, out)
    stored = json.loads((out / "text_encoder" / "config.json").read_text())
    assert stored["dtype"] == "float32"
    ours = family.kind.from_pretrained(out, torch_dtype=getattr(torch, dtype))
    weights = ours.text_encoder.state_dict()
    theirs = family.pipeline().text_encoder.to(getattr(torch, dtype)).state_dict()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


def test_an_exported_consistency_model(tiny_lcm_folder: str, tmp_path: Path) -> None:
    out = export(Path(tiny_lcm_folder), "pipeline", tmp_path / "out", "--dtype", "float16")
    runs(LatentConsistencyModelPipeline, out)


def test_single_files(family: Family, tmp_path: Path) -> None:
    file = export(Path(family.folder), "single-file", tmp_path / "m.safetensors", *HALF)
    config = export(Path(family.folder), "pipeline", tmp_path / "config", *HALF)
    plain = family.kind.from_single_file(str(file), config=str(config))
    plain.set_progress_bar_config(disable=True)
    assert picture(plain).isfinite().all()
