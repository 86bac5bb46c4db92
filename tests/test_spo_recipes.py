"""The published SPO recipes from prompts to weights, at a very small size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from lit_prefopt.cli import main
from tests.helpers.published import _published
from tests.helpers.runs import scalars
from tests.helpers.tiny import tiny_decoder
from tests.judges.test_clip import folder as clip

__all__ = ["clip"]


@pytest.fixture
def arguments(clip: str, tmp_path: Path) -> list[str]:
    """What points a recipe at small files, and makes it short."""
    torch.manual_seed(0)
    torch.save(_published(), tmp_path / "judge.bin")
    records = [{"caption": f"picture {i}", "trainset_idx": i} for i in range(6)]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    return [
        *("--data.prompts.path", str(tmp_path / "prompts.json")),
        *("--model.judge.weights", str(tmp_path / "judge.bin")),
        *("--model.judge.pretrained", clip, "--model.judge.processor", clip),
        *("--model.threshold", "0", "--data.batches", "8", "--data.batch_size", "2"),
        *("--batch.pairs", "8"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--data.round_size", "1", "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.default_root_dir", str(tmp_path / "run")),
        *("--trainer.enable_progress_bar", "false", "--backbone.dtype", "float32"),
    ]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_from_prompts_to_weights(
    name: str, arguments: list[str], tiny_folder: str, tiny_xl_folder: str, tmp_path: Path
) -> None:
    pipeline = tiny_xl_folder if name == "sdxl" else tiny_folder
    small = ["--backbone.pretrained", pipeline, "--backbone.decoder", tiny_decoder(tmp_path / "d")]
    small += ["--backbone.vae", f"{pipeline}/vae"]
    main(["fit", "--config", f"{name}-spo", *arguments, *small])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/margin"][0] == 0
    assert logged["train/margin"][1] != 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    rank = {"sd15": 4, "sdxl": 64}[name]
    assert recipe["backbone"]["init_args"]["lora"]["rank"] == rank
    assert (tmp_path / "run" / "weights" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--model.judge.weights", "none.bin"], "There is no file none.bin: name the step-aware"),
        (["--data.prompts.path", "none.json"], "none.json cannot be read .*check the path"),
        (["--data.prompts.column", "text"], "has no 'text', but 'caption', 'trainset_idx'"),
        (["--backbone.decoder", "none"], "none is no local folder"),
    ],
)
def test_what_is_missing_is_said_at_the_start(
    arguments: list[str], tiny_folder: str, tmp_path: Path, change: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(
            [
                "fit",
                "--config",
                "sd15-spo",
                *arguments,
                "--backbone.pretrained",
                tiny_folder,
                *change,
            ]
        )
    assert not (tmp_path / "run" / "checkpoints").exists()
