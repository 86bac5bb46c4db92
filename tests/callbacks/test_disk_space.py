"""A run whose checkpoints do not fit on the disk stops before its first step."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main

Usage = namedtuple("Usage", "total used free")


def test_checkpoints_need_weights_and_moments_twice(
    recipe: list[str], backbone: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_prefopt.utils.output_lock.LEAST_BYTES", 0)
    numbers = sum(p.numel() for p in backbone.policy.denoiser.parameters())
    needed = 2 * 3 * 4 * numbers  # two files of a weight and AdamW's two moments in float32
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, needed * 0.99))
    with pytest.raises(SystemExit, match="run.* free: its checkpoints need about .* MB; free disk"):
        main(["fit", *recipe])
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, needed * 1.01))
    main(["fit", *recipe])
    # a run that is resumed has one file already
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, needed * 0.6))
    main(["fit", *recipe, "--ckpt_path", "last"])
