"""The commands of the guide on FLUX.2 klein run in their order, with a very small klein."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.quoted_commands import fenced_commands
from tests.helpers.recipes import LORA_WEIGHTS, on_cpu
from tests.helpers.runs import scalars
from tests.helpers.tiny_flux2 import tiny_flux2_pipeline

pytestmark = pytest.mark.slow
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "klein-on-your-pairs.md"
SIDE = 32


def write_pairs(folder: Path, count: int) -> None:
    """Write a table of pairs and their images, of which the brighter are preferred."""
    noise = torch.Generator().manual_seed(0)
    with (folder / "mine.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["prompt", "chosen", "rejected"])
        for number in range(count):
            names = [f"{number:03}-{side}.png" for side in "ab"]
            for name, low in zip(names, (128, 0), strict=True):
                pixels = torch.randint(low, low + 128, (SIDE, SIDE, 3), generator=noise)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name)
            table.writerow([f"a scene of {number} boats", *names])


def smaller(command: Sequence[str], pipeline: Path) -> list[str]:
    """Return what makes a command of the guide one for the very small klein."""
    if command[0] in ("shards", "export"):
        return []
    if command[0] == "evaluate":
        size = {"steps": 2, "guidance": 4.0, "batch_size": 8, "height": SIDE, "width": SIDE}
        return [
            *("--model.reference", str(pipeline), "--model.base", str(pipeline)),
            *("--model.judge", "tests.generate.test_ranked.Brightness", "--model.images", "1"),
            *("--model.sampling", json.dumps(size), "--model.dtype", "float32"),
            *("--data.prompts", "PromptFile", "--data.prompts.path", "prompts.txt"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    arguments = on_cpu(pipeline)
    if command[0] == "predict":
        return [*arguments, "--model.resolution", str(SIDE)]
    return [
        *arguments,
        *("--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", "--data.workers", "0"),
        *("--batch.validate_every", "2"),
    ]


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, 40)
    (tmp_path / "prompts.txt").write_text("a boat\ntwo boats\nthree boats\nfour boats\n")
    pipeline = tiny_flux2_pipeline(tmp_path / "klein")
    commands = fenced_commands(GUIDE.read_text())
    assert [command[0] for command in commands] == (
        ["shards"] * 3 + ["predict"] * 2 + ["estimate", "fit", "evaluate"] + ["export"] * 2
    )
    for command in commands:
        small = [str(SIDE) if part == "512" else part for part in command]
        main([*small, *smaller(command, pipeline)])
    logged = scalars(tmp_path / "mine" / "dpo")
    assert logged["train/margin"][0] == 0
    assert logged["val/accuracy"]
    assert (tmp_path / "mine" / "evaluation" / "report.html").exists()
    stock = Flux2KleinPipeline.from_pretrained(pipeline)
    stock.load_lora_weights(tmp_path / "mine" / "taste.safetensors")
    trained = load_file(tmp_path / "mine" / "dpo" / LORA_WEIGHTS)
    layers = {name.rsplit(".lora_", 1)[0] for name in trained}
    assert len(layers) == sum(hasattr(module, "lora_A") for module in stock.transformer.modules())
