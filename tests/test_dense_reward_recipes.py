"""The published dense-reward recipes from prompts to weights, at a very small size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.runs import scalars


@pytest.fixture
def arguments(tiny_folder: str, tmp_path: Path) -> list[str]:
    """What points a recipe at small files, and makes it short."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(6)))
    return [
        *("--data.prompts.path", str(tmp_path / "prompts.txt")),
        *("--model.judge", "tests.helpers.judges.Brightness", "--model.sampling.steps", "4"),
        *("--backbone.pretrained", tiny_folder, "--backbone.dtype", "float32"),
        *("--data.batches", "8", "--data.batch_size", "2", "--trainer.max_steps", "9"),
        *("--data.collection", "2", "--data.keep", "3", "--trainer.accelerator", "cpu"),
        *("--trainer.precision", "32-true", "--batch.pairs", "2"),
        *("--trainer.default_root_dir", str(tmp_path / "run")),
        *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    ]


@pytest.mark.parametrize(("name", "rank"), [("dense-reward", 32), ("dense-reward-single", 4)])
def test_from_prompts_to_weights(
    name: str, rank: int, arguments: list[str], tmp_path: Path
) -> None:
    main(["fit", "--config", f"sd15-{name}", *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/margin"][0] == 0
    assert logged["train/margin"][1] != 0
    assert len(set(logged["train/judge"])) == 2  # of the two collections
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["backbone"]["init_args"]["lora"]["rank"] == rank
    written = load_file(max((tmp_path / "run" / "buffers").iterdir()))
    states = [value for name, value in written.items() if name.endswith(".states")]
    assert {x.dtype for x in states} == {torch.bfloat16}
    assert sum(len(x) for x in states) == 3
    assert (tmp_path / "run" / "weights" / "pytorch_lora_weights.safetensors").is_file()
