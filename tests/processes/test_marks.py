"""Marks of prediction type and noise schedule in single files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_prefopt.errors import InputError
from lit_prefopt.processes.marks import (
    add_metadata,
    find_marks,
    mark_metadata,
    mark_tensors,
    read_marks,
    source_marks,
)

V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("keys", "metadata", "config"),
    [
        ([], {}, {}),
        ([], {"modelspec.prediction_type": "epsilon"}, {}),
        (["v_pred"], {}, V),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, V | ZERO),
        (["ztsnr"], {}, ZERO),
        ([], {"modelspec.prediction_type": "v"}, V),
        ([], {"modelspec.predict_key": "v"}, V),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, V | ZERO),
        ([], {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, {}),
    ],
)
def test_what_each_mark_stands_for(
    keys: list[str], metadata: dict[str, str], config: dict[str, object]
) -> None:
    assert find_marks("x.safetensors", ["a.weight", *keys], metadata).config == config


def test_marks_are_named() -> None:
    marks = find_marks("x", ["v_pred", "ztsnr"], {"modelspec.prediction_type": "v"})
    expected = "v prediction (v_pred, modelspec.prediction_type) with zero terminal SNR (ztsnr)"
    assert marks.summary == expected
    assert find_marks("x", ["a"], {}).summary == ""


@pytest.mark.parametrize("key", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_other_noise_processes_are_refused(key: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"a model of EDM .*its key {key}"):
        read_marks(str(tmp_path / "x.safetensors"))


def test_marks_of_a_denoiser_come_first(tmp_path: Path) -> None:
    plain, v, both = (str(tmp_path / f"{name}.safetensors") for name in ("plain", "v", "both"))
    save_file({"a": torch.ones(1)}, plain)
    save_file({"a": torch.ones(1), **mark_tensors(True, False)}, v)
    save_file({"a": torch.ones(1), **mark_tensors(True, True)}, both)
    assert source_marks(None, "runs/folder").config == {}
    assert source_marks(None, v).config == V
    assert source_marks(both, v).config == V | ZERO
    assert source_marks(plain, v).config == V


@pytest.mark.parametrize("zero", [False, True])
def test_written_marks_are_read_again(zero: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1), **mark_tensors(True, zero)}, file)
    assert read_marks(str(file)).config == (V | ZERO if zero else V)
    save_file({"a": torch.ones(1), **mark_tensors(False, zero)}, file, {"own": "kept"})
    assert read_marks(str(file)).config == {}
    add_metadata(file, mark_metadata(True, zero))
    assert read_marks(str(file)).config == (V | ZERO if zero else V)
    assert torch.equal(load_file(file)["a"], torch.ones(1))
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["own"] == "kept"
