"""Exports keep what their base is marked as: v prediction and zero terminal SNR."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lit_prefopt.processes.marks import read_marks
from tests.helpers.exporting import Family, export, metadata, refused, write_lora

MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


@pytest.fixture(scope="module")
def family(tiny_xl_folder: str) -> Family:
    """An SDXL with epsilon prediction, which gives the architecture of the files."""
    return Family(StableDiffusionXLPipeline, tiny_xl_folder)


@pytest.fixture(scope="module")
def base(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments that name a marked single file as the base."""
    folder = tmp_path_factory.mktemp("base")
    plain = export(Path(family.folder), "single-file", folder / "plain.safetensors")
    save_file(load_file(plain) | MARKS, folder / "noob.safetensors")
    return ("--base", str(folder / "noob.safetensors"), "--base_config", family.folder)


def test_merged_files_have_the_marks_of_their_base(
    family: Family, base: tuple[str, ...], tmp_path: Path
) -> None:
    lora = write_lora(family, tmp_path / "lora")
    out = export(lora, "single-file", tmp_path / "out.safetensors", *base)
    state = load_file(out)
    assert state["v_pred"].numel() == state["ztsnr"].numel() == 0
    assert metadata(out)["modelspec.prediction_type"] == "v"
    plain = export(lora, "single-file", tmp_path / "eps.safetensors", "--base", family.folder)
    assert not {"v_pred", "ztsnr"} & set(load_file(plain))
    assert metadata(plain)["modelspec.prediction_type"] == "epsilon"


@pytest.mark.parametrize("stock", ["DDIMScheduler", "PNDMScheduler"])
def test_merged_pipelines_end_in_pure_noise(
    stock: str, family: Family, base: tuple[str, ...], tmp_path: Path
) -> None:
    lora = write_lora(family, tmp_path / "lora")
    config = tmp_path / "config"
    family.pipeline().save_pretrained(config)
    path = config / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": stock}))
    index = config / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", stock))
    named = (*base[:3], str(config))
    out = export(lora, "pipeline", tmp_path / "out", *named)
    scheduler = StableDiffusionXLPipeline.from_pretrained(out).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("to", ["kohya", "diffusers-lora"])
def test_loras_state_the_prediction_of_their_base(
    to: str, family: Family, base: tuple[str, ...], tmp_path: Path
) -> None:
    lora = write_lora(family, tmp_path / "lora")
    out = export(lora, to, tmp_path / "out.safetensors", *base)
    stated = metadata(out)
    assert stated["modelspec.prediction_type"] == "v"
    assert (stated["ss_v_parameterization"], stated["ss_zero_terminal_snr"]) == ("True", "True")
    other = "kohya" if to == "diffusers-lora" else "diffusers-lora"
    again = export(out, other, tmp_path / "again.safetensors", "--base", family.folder)
    assert read_marks(str(again)).config == read_marks(str(out)).config
    assert read_marks(str(again)).zero


def test_an_edm_base_is_refused(family: Family, base: tuple[str, ...], tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path / "lora")
    edm = load_file(base[1]) | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    save_file(edm, tmp_path / "playground.safetensors")
    to = ("--source", lora, "--to", "single-file", "--output", tmp_path / "out.safetensors")
    named = ("--base", tmp_path / "playground.safetensors", "--base_config", family.folder)
    assert "a model of EDM" in refused(*to, *named)
