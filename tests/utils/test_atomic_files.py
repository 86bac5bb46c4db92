"""Outputs are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import atomic_output, write_atomic


def test_a_whole_output_gets_its_name_and_can_be_read_by_others(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "new" / "x.safetensors") as path:
        save_file({"x": torch.ones(1)}, path)
        assert not (tmp_path / "new" / "x.safetensors").exists()
    assert (tmp_path / "new" / "x.safetensors").stat().st_mode & 0o777 == 0o644
    with atomic_output(tmp_path / "folder") as path:
        (path / "inner").mkdir(parents=True)
        save_file({"x": torch.ones(1)}, path / "inner" / "x.safetensors")
    assert (tmp_path / "folder" / "inner" / "x.safetensors").stat().st_mode & 0o777 == 0o644
    assert {p.name for p in tmp_path.iterdir()} == {"new", "folder"}


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        write_atomic(tmp_path / "pipe", "text")
    with (
        pytest.raises(InputError, match="is a pipe or a device"),
        atomic_output(tmp_path / "pipe", replace=True) as path,
    ):
        path.write_text("text")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def write_half(output: Path) -> None:
    with atomic_output(output) as path:
        path.mkdir()
        (path / "half").write_text("written")
        raise RuntimeError("half way")


def test_a_broken_output_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        write_half(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
