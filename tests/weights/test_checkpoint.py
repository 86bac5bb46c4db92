"""What is wrong with a checkpoint file is described in a sentence, whatever its bytes are."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prefopt.errors import InputError
from lit_prefopt.weights.checkpoint import RESUME_PARTS, RUN_PARTS, fault, read_checkpoint


def state() -> dict[str, Any]:
    return {
        "state_dict": {"weight": torch.arange(100.0)},
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "recipe": "backbone: {}",
    }


def written(path: Path, **changes: object) -> Path:
    torch.save({**state(), **changes}, path)
    return path


def test_a_whole_one_has_no_fault(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    assert fault(path, RESUME_PARTS, recipe=True) is None
    os.symlink(path, tmp_path / "link.ckpt")
    assert fault(tmp_path / "link.ckpt", RESUME_PARTS) is None


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"optimizer_states": None}, "no valid optimizer_states, so no run can be resumed"),
        ({"loops": {}}, "no valid loops/fit_loop"),
        ({"loops": 3}, "no valid loops/fit_loop"),
        ({"global_step": "3"}, "no valid global_step, so it is not a checkpoint"),
        ({"state_dict": [1]}, "no valid state_dict"),
        ({"state_dict": {"weight": 3}}, "contains more than tensors"),
        ({"recipe": "a: [1"}, "is not valid YAML"),
        ({"recipe": "words"}, "has no keys"),
        ({"recipe": 3}, "has no keys"),
    ],
)
def test_parts_that_are_missing_or_of_another_type(
    tmp_path: Path, changes: dict[str, Any], described: str
) -> None:
    path = written(tmp_path / "a.ckpt", **changes)
    assert described in str(fault(path, RESUME_PARTS))
    if not set(changes) & {"optimizer_states", "loops"}:
        assert described in str(fault(path, RUN_PARTS))
        return
    assert fault(path, RUN_PARTS) is None  # its weights can be validated


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def other_object(path: Path) -> None:
    torch.save([1, 2], path)


def without_recipe(path: Path) -> None:
    held = state()
    del held["recipe"]
    torch.save(held, path)


def forbidden(path: Path) -> None:
    written(path).chmod(0)


@pytest.mark.parametrize(
    ("make", "described"),
    [
        (dangling, "cannot be read (No such file or directory)"),
        (Path.mkdir, "is not a file"),
        (os.mkfifo, "is not a file"),
        (Path.touch, "is damaged, truncated, or"),
        (other_object, "has no valid state_dict"),
        (without_recipe, "contains no recipe"),
        pytest.param(
            forbidden,
            "cannot be read (Permission denied)",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
        ),
    ],
)
def test_files_that_are_none(tmp_path: Path, make: Callable[[Path], Any], described: str) -> None:
    make(tmp_path / "a.ckpt")
    assert described in str(fault(tmp_path / "a.ckpt", RESUME_PARTS, recipe=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path / "a.ckpt")
    content, draw = path.read_bytes(), random.Random(seed)
    found = 0
    for _ in range(200):
        spoilt = bytearray(content)
        spoilt[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        if fault(path, RESUME_PARTS, recipe=True) is None:
            weight = read_checkpoint(path)["state_dict"]["weight"]
            assert torch.equal(weight, torch.arange(100.0))
        else:
            found += 1
    assert found > 100


def test_reading_what_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(InputError, match="is damaged, truncated, or is not a"):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        read_checkpoint(tmp_path / "none.ckpt")
