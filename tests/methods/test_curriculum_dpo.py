"""Curriculum DPO: Diffusion-DPO where there is one stage, and a log that tells the stage."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from tests.helpers.runs import same

ENDS = ("state_dict", "optimizer_states", "lr_schedulers")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two stages of six pairs each."""
    folder, random = tmp_path_factory.mktemp("curriculum"), np.random.default_rng(0)
    for stage in (1, 2):
        with ShardWriter(folder / f"stage-{stage}") as writer:
            for i in range(6):
                dark = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                writer.add(f"picture {stage} {i}", dark + np.uint8(120 // stage), dark)
    return folder


def arguments(recipe: list[str], folder: Path, *more: str) -> list[str]:
    """Return those of the small recipe with another model and other data."""
    replaced = [*recipe, "--trainer.default_root_dir", str(folder), "--data.validation", "null"]
    return [*replaced, "--model.optimizer.warmup_steps", "0", *more]


def test_with_one_stage_it_is_diffusion_dpo_to_the_last_bit(
    recipe: list[str], stages: Path, tmp_path: Path
) -> None:
    shards = ["--data.shards", str(stages / "stage-1")]
    main(["fit", *arguments(recipe, tmp_path / "plain", *shards)])
    data = ["--model", "CurriculumDPO", "--data", "CurriculumPairs"]
    data += ["--data.stages", str(stages / "stage-{1..1}"), "--data.stage_steps", "1"]
    main(["fit", *arguments(recipe, tmp_path / "one", *data)])
    plain, one = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)
        for run in ("plain", "one")
    )
    assert plain["global_step"] == one["global_step"] == 4
    assert all(same(plain[key], one[key]) for key in ENDS)
    assert plain["state_dict"]


def test_the_stage_is_logged(recipe: list[str], stages: Path, tmp_path: Path) -> None:
    data = ["--model", "CurriculumDPO", "--data", "CurriculumPairs", "--data.stages", str(stages)]
    data += ["--data.stage_steps", "3", "--trainer.max_steps", "8"]
    data += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "log")]
    main(["fit", *arguments(recipe, tmp_path / "run", *data)])
    [path] = tmp_path.rglob("metrics.csv")
    with path.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/stage"]]
    assert [float(row["train/stage"]) for row in rows] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_pairs_without_stages_are_refused(recipe: list[str]) -> None:
    with pytest.raises(SystemExit, match="CurriculumDPO trains on pairs in stages: give `--data"):
        main(["fit", *recipe, "--model", "CurriculumDPO"])
