"""Rounds: each from the policy of the one before, resumed where they were stopped."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.runs import TWO_RANKS, finished, kill, launch, wait_until

UNET = Path("diffusion_pytorch_model.safetensors")


@pytest.fixture
def recipes(tiny_folder: str, shards: str, tmp_path: Path) -> list[str]:
    """Arguments of rounds on a tiny pipeline."""
    backbone = f"{{class_path: StableDiffusion, init_args: {{pretrained: {tiny_folder}}}}}"
    common = f"backbone: {backbone}\ntrainer: {{accelerator: cpu, devices: 1"
    (tmp_path / "generate.yaml").write_text(
        "model: {class_path: SelfPlay, init_args: {output: unused, sampling: {steps: 2}}}\n"
        f"data: {{class_path: PairGroups, init_args: {{shards: {shards}, group_size: 6}}}}\n"
        f"{common}}}\n"
    )
    (tmp_path / "fit.yaml").write_text(
        "model: {class_path: SPINDiffusion, init_args: {beta: 100,"
        " optimizer: {class_path: AdamW, init_args: {lr: 1.0e-3}}}}\n"
        f"data: {{class_path: PairShards, init_args: {{shards: {shards}, batch_size: 4,"
        " resolution: 32, workers: 0}}\n"
        f"{common}, max_steps: 3, limit_val_batches: 0}}\n"
    )
    return [
        *("rounds", "--fit", str(tmp_path / "fit.yaml")),
        *("--generate", str(tmp_path / "generate.yaml"), "--count", "2"),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / UNET)


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_another_runs_folder_is_not_continued(recipes: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "round-0").mkdir(parents=True)
    (out / "round-0" / "arguments.json").write_text(json.dumps([["--config", "other"], []]))
    with pytest.raises(SystemExit, match="round of another run"):
        main([*recipes, "--output", str(out)])
    (out / "round-0" / "arguments.json").unlink()
    (out / "round-0" / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not written by `lit-prefopt rounds`"):
        main([*recipes, "--output", str(out)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--count", "0"], "count is 0"),
        (["--fit_arguments", "[--backbone.start_lora=some.safetensors]"], "merge it once"),
        (["--each", "[[--model.beta=2], [--model.betta=2]]"], "^2$"),
    ],
)
def test_what_would_stop_a_later_step_stops_the_first(
    change: list[str], sentence: str, recipes: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main([*recipes, "--output", str(tmp_path / "out"), *change])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_rounds(recipes: list[str], tmp_path: Path) -> None:
    """With LoRA, so that every policy is merged; killed in the second generation and fit."""
    recipes += ["--fit_arguments", "[--backbone.lora.rank=2]", "--each"]
    recipes += ["[[--model.beta=50], [--model.beta=100]]", "--output"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    said = finished(launch([*recipes, str(whole)]))
    assert (whole / "round-1" / "done").exists(), said
    second = out / "round-1"
    for moment in (second / "pairs.parts" / "00000001", second / "recipe.yaml"):
        running = launch([*recipes, str(out)])
        wait_until(moment.exists, running, patience=240)
        kill_with_children(running)
        assert not (second / "done").exists()
    finished(launch([*recipes, str(out)]))
    for number in range(2):
        name = f"round-{number}"
        assert equal(out / name / "unet", whole / name / "unet")
        for file in (whole / name / "pairs").iterdir():
            assert (out / name / "pairs" / file.name).read_bytes() == file.read_bytes()
    assert not equal(whole / "round-0" / "unet", whole / "round-1" / "unet")
    # the second opponent is the first policy, and the second recipe says so
    assert str(whole / "round-0" / "unet") in (whole / "round-1" / "recipe.yaml").read_text()
    assert "beta: 100" in (whole / "round-1" / "recipe.yaml").read_text()
    assert "beta: 50" in (whole / "round-0" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_two_ranks_take_turns_together(recipes: list[str], tmp_path: Path) -> None:
    two = "[--trainer.devices=2, --trainer.strategy=ddp]"
    more = ["--fit_arguments", two, "--generate_arguments", two, "--output", str(tmp_path / "out")]
    said = finished(launch([*recipes, *more], TWO_RANKS))
    assert (tmp_path / "out" / "round-1" / "done").exists(), said
    first, second = (tmp_path / "out" / f"round-{n}" / "weights" / "unet" for n in (0, 1))
    assert not equal(first, second)


def kill_with_children(running: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the command and to the one that it runs now."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    kill(running)
    for child in children:
        with suppress(ProcessLookupError):  # which ended with the command
            os.kill(int(child), 9)
    running.communicate()
